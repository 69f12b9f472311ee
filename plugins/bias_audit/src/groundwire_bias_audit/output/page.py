"""Page of an audit: verdict, tables and pictures, as a section of a run's report or as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from groundwire import Finding, Section, Table
from groundwire_bias_audit.audit.gate import conclusion, not_gated
from groundwire_bias_audit.audit.groups import with_groups
from groundwire_bias_audit.audit.record import AuditRecord
from groundwire_bias_audit.output import figures
from groundwire_bias_audit.output.export import LIMITATIONS, plain, versions, write_text
from groundwire_bias_audit.output.findings import SEVERITY


def section(results: Mapping[str, AuditRecord]) -> Section:
    """Tables and pictures of the variants of one model; the first one is the model itself."""
    asked = next(iter(results.values()))
    results = {name: replace(result, metrics=None) for name, result in results.items()}  # pictures have their own
    first = next(iter(results.values()))
    tables = [_verdicts(results), _tests(results)]
    pictures: list[Any] = []
    metrics = _shown(first)
    for feature in first.features:
        tables.append(frame_table(f"Groups of {feature}", _with_index(asked.to_frame([feature]))))
        if first.task in ("binary", "multilabel"):
            tables.append(frame_table(f"Impact ratios of {feature}", _with_index(first.impact_ratios([feature]))))
        if not first.counts.groups.controls and not (first.task == "multilabel" and len(first.targets) > 1):
            pictures.append(partial(figures.group_bars, first, feature, metrics))
            if first.counts.scored and first.task == "binary":
                tables.append(
                    frame_table(f"Confusion by confidence, {feature}", _with_index(first.confidence([feature])))
                )
                pictures.append(partial(figures.confusion_by_confidence, first, feature))
            if len(results) > 1:
                pictures.append(partial(figures.curves, results, feature, metrics[0]))
        for name, result in results.items():
            if result.comparison is not None:
                frame = _with_index(result.comparison.to_frame([feature]))
                tables.append(frame_table(f"Changes in variant {name}, groups of {feature}", frame))
    return Section("Bias audit", _text(results), tables, pictures)


def _shown(result: AuditRecord) -> list[str]:
    if result.task == "regression":
        return ["mean_absolute_error", "mean_error"]
    if result.task == "multiclass":
        return ["accuracy"]
    return ["accuracy", "true_positive_rate", "false_positive_rate", "selection_rate"]


def _text(results: Mapping[str, AuditRecord]) -> str:
    first = next(iter(results.values()))
    gate = first.gate
    lines = []
    for name, result in results.items():
        lines.append(f"{name}: {result.verdict}: {result.conclusion}.")
        if result.comparison is not None:
            change = result.comparison
            lines.append(f"Change in {name}: {change.verdict}: {conclusion(change.tests, gate)}.")
    lines.append(
        f"A disparity is a difference of two groups in {_gated(first)} that is shown to exceed {gate.tolerance:g} by "
        f"exact tests of all pairs of groups, at {gate.alpha:g} over all tests together ({gate.correction}). Groups "
        f"with fewer than {gate.min_count} rows in a denominator are not judged; for a pass the others must hold 90 % "
        f"of the rows. {not_gated(first.task, gate)} The intervals in the pictures are 95 % bootstrap intervals of "
        "single values."
    )
    if first.dropped:
        lines.append(f"{len(first.dropped)} combinations of the features have no row.")
    return "\n\n".join(lines)


def _gated(result: AuditRecord) -> str:
    names = dict.fromkeys(test.metric for test in result.tests)
    return ", ".join(names or result.gate.metrics or ())


def _verdicts(results: Mapping[str, AuditRecord]) -> Table:
    rows = []
    for name, result in results.items():
        overall = result.to_frame([])
        main = _shown(result)[0]
        change = "" if result.comparison is None else str(result.comparison.verdict)
        flips = None
        if result.comparison is not None:
            flips = float(result.comparison.flips.sum() / max(int(result.comparison.pairs.sum()), 1))
        uncertain = float(overall["uncertainty"].mean()) if "uncertainty" in overall else None
        rows.append((name, str(result.verdict), float(overall[main].mean()), uncertain, flips, change))
    columns = (
        "variant",
        "verdict",
        _shown(next(iter(results.values())))[0],
        "uncertainty",
        "flip rate",
        "change",
    )
    return Table("Variants of the model", columns, plain(rows))


def _tests(results: Mapping[str, AuditRecord]) -> Table:
    found = [(name, test) for name, result in results.items() for test in result.tests]
    found += [(name, test) for name, r in results.items() if r.comparison is not None for test in r.comparison.tests]
    rows = [
        (
            name, ", ".join(map(str, (t.attribute, *t.control))), t.metric, t.target, t.gap, *t.bounds, t.p_adjusted,
            t.disparity, ", ".join(map(str, t.outliers)), ", ".join(map(str, t.small)), t.insufficient,
        )
        for name, t in found[:200]
    ]  # fmt: skip
    columns = ("variant", "feature", "metric", "target", "gap", "at least", "at most", "adjusted P", "disparity",
               "stands out", "too few rows", "no pass because")  # fmt: skip
    return Table("Gated gaps and changes", columns, plain(rows))


def _with_index(frame: pd.DataFrame) -> pd.DataFrame:
    flat = frame.copy()
    flat.columns = [" ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in frame.columns]
    return with_groups(flat)


def frame_table(caption: str, frame: pd.DataFrame) -> Table:
    """Return at most 200 rows of ``frame`` as a table of the page."""
    rows: Sequence[Any] = [plain(list(row)) for row in frame.itertuples(index=False, name=None)]
    return Table(caption, [str(c) for c in frame.columns], rows[:200])


def to_html(result: AuditRecord, path: str | Path | None = None) -> str:
    """See :meth:`groundwire_bias_audit.AuditResult.to_html`."""
    from groundwire.services.report.page import render

    message = f"{result.title}: {result.verdict}: {result.conclusion}."
    finding = Finding("bias_audit", "verdict", SEVERITY[result.verdict], str(result.verdict), message)
    shown = section({"model": result})
    limits = Section("Limitations", "\n\n".join(LIMITATIONS))
    meta = {"module": "Bias audit", "task": result.task, "features": list(result.features), **result.meta}
    text = render(plain(meta | versions()), [finding], [("bias_audit", shown), ("bias_audit", limits)])
    write_text(text, path)
    return text
