"""The numbers of an audit as findings of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from groundwire import Finding
from groundwire.types import Severity
from groundwire_bias_audit.association import bias_amplification, interdependence, rare_value_ratio
from groundwire_bias_audit.gate import Verdict
from groundwire_bias_audit.questions import describe
from groundwire_bias_audit.result import AuditResult
from groundwire_bias_audit.stream import Stream
from groundwire_bias_audit.training import TrainingCounts

SEVERITY: dict[Verdict, Severity] = {
    Verdict.PASS: "info",
    Verdict.INSUFFICIENT: "warn",
    Verdict.DISPARITY: "fail",
}


def findings_of(
    plugin: str, version: str, result: AuditResult, stream: Stream, training: TrainingCounts
) -> list[Finding]:
    """Verdict, overall metrics, gaps, and what changed; codes end in ``@version`` for other versions than the model."""
    suffix = "" if version == "dense" else f"@{version}"
    found = [_verdict(plugin, version, suffix, result)]
    for code, value, text in [*_numbers(result), *_paper(result, stream, training)]:
        if not math.isnan(value):
            found.append(Finding(plugin, code + suffix, "info", value, f"{text} ({_named(version)})."))
    if result.comparison is not None:
        found += _changes(plugin, version, result)
    return found


def _named(version: str) -> str:
    return "the model as it is" if version == "dense" else f"version {version}"


def _verdict(plugin: str, version: str, suffix: str, result: AuditResult) -> Finding:
    reasons = "; ".join(describe(test) for test in result.disparities)
    if result.verdict is Verdict.INSUFFICIENT:
        small = sorted({str(group) for test in result.tests for group in test.small})
        reasons = f"too few rows to judge {', '.join(small[:5])}" if small else "there is only one group"
    text = f"Audit of {_named(version)}: {result.verdict}{': ' if reasons else ''}{reasons}."
    return Finding(plugin, f"verdict{suffix}", SEVERITY[result.verdict], str(result.verdict), text)


def _numbers(result: AuditResult) -> Iterator[tuple[str, float, str]]:
    overall = result.to_frame([], target=None)
    for name in ("accuracy", "roc_auc", "calibration_error", "uncertainty", "mean_absolute_error"):
        if name in overall:
            text = f"{name} over all rows" + (", mean over targets" if len(overall) > 1 else "")
            yield name, _mean(overall[name]), text
    if result.task in ("binary", "multilabel"):
        _, worst = result.worst_group
        yield "worst_group_accuracy", worst, "Lowest accuracy of a cell of group and label"
    largest: dict[tuple[str, str], float] = {}
    for test in result.tests:
        key = test.metric, test.attribute
        largest[key] = max(largest.get(key, -math.inf), -math.inf if math.isnan(test.gap) else test.gap)
    for (metric, attribute), gap in largest.items():
        value = math.nan if math.isinf(gap) else gap
        yield f"{metric}_gap[{attribute}]", value, f"Largest difference of {metric} between groups of {attribute}"


def _mean(values: Any) -> float:
    kept = np.asarray(values, dtype=float)
    return float(np.nanmean(kept)) if not np.isnan(kept).all() else math.nan


def _paper(result: AuditResult, stream: Stream, training: TrainingCounts) -> Iterator[tuple[str, float, str]]:
    if result.task not in ("binary", "multilabel"):
        return
    amplified = [a for a in amplifications(result, training).values() if not math.isnan(a)]
    if amplified:
        worst = max(amplified, key=abs)
        yield "bias_amplification", worst, f"Largest of {len(amplified)} eligible bias amplifications"
    counts = result.evidence.overall().counts
    assert counts is not None
    rare = [rare_value_ratio(counts[0, t]) for t in range(counts.shape[1])]
    if not np.isnan(rare).all():
        yield "rare_value_ratio", float(np.nanmin(rare)), "Predicted over true frequency of the rarer value, the lowest"
    if stream.products is not None:
        linked = interdependence(stream.products)
        if not np.isnan(linked).all():
            yield "interdependence", float(np.nanmean(linked)), "How well other outputs predict an output (mean R^2)"


def amplifications(result: AuditResult, training: TrainingCounts | None = None) -> dict[tuple[Any, ...], float]:
    """Bias amplification by (feature, group, target), NaN where it is not eligible."""
    found = {}
    for feature in result.features:
        evidence = result.evidence.of([feature])
        if evidence.counts is None or evidence.groups.controls:
            continue
        total = evidence.counts.sum(axis=0)
        for g, level in enumerate(evidence.groups.levels[0]):
            trained = None if training is None else training.of(feature, level)
            for t, target in enumerate(result.targets):
                inside = evidence.counts[g, t]
                cells = np.stack([total[t] - inside, inside])
                trained_cells = None if trained is None else trained[t]
                found[feature, level, target] = bias_amplification(cells, trained_cells).value
    return found


def _changes(plugin: str, version: str, result: AuditResult) -> Iterator[Finding]:
    assert result.comparison is not None
    comparison, suffix = result.comparison, f"@{version}"
    rows = comparison.pairs.sum() / max(comparison.pairs.shape[1], 1)
    flips = float(comparison.flips.sum() / comparison.flips.shape[1] / rows)
    yield Finding(
        plugin, f"flip_rate{suffix}", "info", flips, f"Share of rows whose prediction changed ({_named(version)})."
    )
    worst = [describe(test) for test in comparison.tests if test.disparity]
    text = f"Did {_named(version)} change more for some groups than for others: {comparison.verdict}"
    text += f": {'; '.join(worst)}." if worst else "."
    severity = SEVERITY[comparison.verdict]
    yield Finding(plugin, f"change_verdict{suffix}", severity, str(comparison.verdict), text)


def nothing_audited(plugin: str, why: str) -> Finding:
    """There was nothing to audit."""
    return Finding(plugin, "audited", "warn", 0, why)


def no_versions(plugin: str) -> Finding:
    """Nobody offers versions of the model."""
    text = "No plugin of this run offers another version of the model; variants=[0.9] prunes to 90 % sparsity."
    return Finding(plugin, "versions", "info", 0, text)


def versions_missed(plugin: str) -> Finding:
    """Versions were asked for, and no validation was known to be the last one."""
    text = (
        "Versions of the model were not audited: the training ended after a validation that was not known to be the "
        "last one. Give every_n_epochs=1, or call trainer.validate."
    )
    return Finding(plugin, "versions", "warn", 0, text)
