"""The audit's part of the report page, and the files next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from groundwire import RunContext, Section, Table
from groundwire.ranks import gathered
from groundwire_bias_audit import figures
from groundwire_bias_audit.examples import Examples
from groundwire_bias_audit.export import plain, to_csv, with_groups
from groundwire_bias_audit.lists import surest_flips, susceptible
from groundwire_bias_audit.passes import LOADER_STEP, Record
from groundwire_bias_audit.result import AuditResult
from groundwire_bias_audit.samples import Samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from groundwire_bias_audit.callback import BiasAudit
    from groundwire_bias_audit.explained import Pairs

#: Most rows of a table on the page.
SHOWN = 40
#: Images of flipped samples for each version.
IMAGES = 8


class Reporter:
    """What the page shows of the latest audit. Only lists and results are kept, no data."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, AuditResult]] = {}
        self.lists: dict[str, pd.DataFrame] = {}
        self.images: dict[str, tuple[list[Any], list[str]]] = {}
        self.examples: dict[tuple[str, str], list[tuple[Any, str]]] = {}
        self.pairs: dict[str, Pairs] = {}

    def show(self, run: RunContext, examples: Examples, samples: Samples) -> None:
        """Remember samples of the confusion by confidence, if they are images."""
        whole = Examples.merged(gathered(run.trainer, examples))
        self.examples = {}
        for cell, found in whole.cells.items() if run.trainer.is_global_zero else ():
            images = samples.images(example.id for example in found)
            if len(images) < len(found):
                self.examples = {}
                return
            titles = [f"{e.id % LOADER_STEP}: {e.score:.2f}\n{figures.label(e.groups, 16)}" for e in found]
            self.examples[cell] = list(zip(images, titles, strict=True))

    def explain(self, stage: str, pairs: Mapping[str, Pairs]) -> None:
        """Remember attribution pairs by version."""
        self.pairs = dict(pairs)
        self.lists |= {f"attribution-{stage}-{name}": pair.table() for name, pair in pairs.items()}

    def take(
        self,
        run: RunContext,
        results: dict[str, AuditResult],
        records: Mapping[str, Record | None],
        reference: Record | None,
        samples: Samples,
        most: int,
    ) -> None:
        """Remember the results of a stage, and ``most`` samples that flipped and that are likely to.

        Every process must call it; only the first one remembers lists.
        """
        self.results[run.stage] = results
        kept = {f"susceptible-{run.stage}": susceptible(run.trainer, records["dense"], most)}
        for name, record in records.items():
            if results[name].comparison is not None:
                flips = surest_flips(run.trainer, reference, record, results[name].task, max(most, IMAGES))
                kept[f"flips-{run.stage}-{name}"] = None if flips is None else flips.head(most)
                if flips is not None and run.trainer.is_global_zero:
                    by_index = reference is None or reference.ids is not None
                    self.images[name] = thumbnails(samples, flips.head(IMAGES)) if by_index else ([], [])
        if run.trainer.is_global_zero:
            self.lists |= {name: table for name, table in kept.items() if table is not None}

    def section(self) -> Section | None:
        """The latest stage's section."""
        if not self.results:
            return None
        stage, results = list(self.results.items())[-1]
        made = section(results)
        tables = [*made.tables]
        for name, table in self.lists.items():
            if f"-{stage}" in name and len(table):
                tables.append(
                    _table(f"{name.replace('-', ' ', 2)} (first {min(len(table), SHOWN)})", table.head(SHOWN))
                )
        drawn = [
            partial(figures.image_row, images, titles, f"Flipped in version {figures.label(name)}")
            for name, (images, titles) in self.images.items()
            if images
        ]
        if any(self.examples.values()):
            drawn.append(partial(figures.confusion_examples, self.examples))
        drawn += [partial(_pairs, name, pair) for name, pair in self.pairs.items() if pair.images]
        return Section(f"{made.title} ({stage})", made.text, tables, [*made.figures, *drawn])

    def write(self, audit: BiasAudit, page: Path) -> None:
        """``bias_audit/<stage>-<version>.json`` and the lists as CSV."""
        folder = page.parent / audit.name
        folder.mkdir(exist_ok=True)
        for stage, results in self.results.items():
            for version, result in results.items():
                result.to_json(folder / f"{_file(f'{stage}-{version}')}.json")
        for name, table in self.lists.items():
            to_csv(table, folder / f"{_file(name)}.csv", index=False)


def _file(name: str) -> str:
    """``name`` as a file name."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)[:100]


def thumbnails(samples: Samples, flips: pd.DataFrame) -> tuple[list[Any], list[str]]:
    """Images of flipped samples, where the data set holds images."""
    images = samples.images(flips.index)
    titles = [f"{row['id']}: {row['label']}\n{row['before']} to {row['after']}" for row in flips.to_dict("records")]
    return images, titles[: len(images)]


def _pairs(name: str, pair: Pairs) -> Figure:
    note = "" if pair.shift.interpretable else ": uninterpretable without a null model"
    title = f"Attributions ({pair.shift.method}) of samples flipped in version {figures.label(name)}{note}"
    return figures.attribution_pairs(pair.images, pair.maps, pair.titles, title)


def section(results: Mapping[str, AuditResult]) -> Section:
    """Tables and pictures of the versions of one model; the first one is the model itself."""
    asked = next(iter(results.values()))
    results = {name: replace(result, metrics=None) for name, result in results.items()}  # pictures have their own
    first = next(iter(results.values()))
    tables = [_verdicts(results), _tests(results)]
    pictures: list[Any] = []
    metrics = _shown(first)
    for feature in first.features:
        tables.append(_table(f"Groups of {feature}", _with_index(asked.to_frame([feature]))))
        if first.task in ("binary", "multilabel"):
            tables.append(_table(f"Impact ratios of {feature}", _with_index(first.impact_ratios([feature]))))
        if not first.evidence.groups.controls and not (first.task == "multilabel" and len(first.targets) > 1):
            pictures.append(partial(figures.group_bars, first, feature, metrics))
            if first.evidence.scored and first.task == "binary":
                tables.append(_table(f"Confusion by confidence, {feature}", _with_index(first.confidence([feature]))))
                pictures.append(partial(figures.confusion_by_confidence, first, feature))
            if len(results) > 1:
                pictures.append(partial(figures.curves, results, feature, metrics[0]))
        for name, result in results.items():
            if result.comparison is not None:
                frame = _with_index(result.comparison.to_frame([feature]))
                tables.append(_table(f"Changes in version {name}, groups of {feature}", frame))
    return Section("Bias audit", _text(results), tables, pictures)


def _shown(result: AuditResult) -> list[str]:
    if result.task == "regression":
        return ["mean_absolute_error", "mean_error"]
    if result.task == "multiclass":
        return ["accuracy"]
    return ["accuracy", "true_positive_rate", "false_positive_rate", "selection_rate"]


def _text(results: Mapping[str, AuditResult]) -> str:
    first = next(iter(results.values()))
    gate = first.gate
    parts = [f"{name}: {result.verdict}" for name, result in results.items()]
    lines = [
        "Verdicts: " + "; ".join(parts) + ".",
        f"A disparity is a gap (max - min over groups) of more than {gate.tolerance:g} in "
        f"{', '.join(gate.metrics or ())} that an exact permutation test finds significant at {gate.alpha:g} over all "
        f"tests together ({gate.correction}). "
        f"Groups with fewer than {gate.min_count} rows in a denominator are not judged, and then there is no pass. "
        "Intervals are 95 % bootstrap intervals; an interval of a gap is no test.",
    ]
    if first.dropped:
        lines.append(f"{len(first.dropped)} combinations of the features have no row.")
    return "\n\n".join(lines)


def _verdicts(results: Mapping[str, AuditResult]) -> Table:
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
        "version",
        "verdict",
        _shown(next(iter(results.values())))[0],
        "uncertainty",
        "flip rate",
        "uneven change",
    )
    return Table("Versions of the model", columns, plain(rows))


def _tests(results: Mapping[str, AuditResult]) -> Table:
    rows = [
        (name, t.attribute, t.metric, t.target, t.gap, t.p_adjusted, t.disparity, ", ".join(map(str, t.outliers)))
        for name, result in results.items()
        for t in result.tests
    ]
    columns = ("version", "feature", "metric", "target", "gap", "adjusted P", "disparity", "stands out")
    return Table("Gated gaps", columns, plain(rows[:200]))


def _with_index(frame: pd.DataFrame) -> pd.DataFrame:
    flat = frame.copy()
    flat.columns = [" ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in frame.columns]
    return with_groups(flat)


def _table(caption: str, frame: pd.DataFrame) -> Table:
    rows: Sequence[Any] = [plain(list(row)) for row in frame.itertuples(index=False, name=None)]
    return Table(caption, [str(c) for c in frame.columns], rows[:200])
