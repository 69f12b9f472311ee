"""The audit's part of the report page, and the files next to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import default_collate

from groundwire import PluginError, RunContext, Section, Table
from groundwire.seeds import preserve_rng
from groundwire_bias_audit import figures
from groundwire_bias_audit.export import plain, to_csv
from groundwire_bias_audit.passes import LOADER_STEP, Record
from groundwire_bias_audit.result import AuditResult
from groundwire_bias_audit.susceptibility import rank_susceptible

if TYPE_CHECKING:
    from groundwire_bias_audit.callback import BiasAudit

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

    def take(
        self,
        audit: BiasAudit,
        run: RunContext,
        results: dict[str, AuditResult],
        records: Mapping[str, Record | None],
        reference: Record | None,
        dataset_of: Callable[[int], Any],
    ) -> None:
        """Remember the results of a stage, the samples that flipped, and those likely to."""
        self.results[run.stage] = results
        if not run.trainer.is_global_zero or not records:
            return
        dense = records.get("dense")
        if dense is not None and dense.outputs.task == "binary":
            assert dense.outputs.scores is not None
            ids = None if dense.ids is None else dense.ids % LOADER_STEP
            ranked = rank_susceptible(dense.outputs.scores[:, 0], dense.features, ids=ids, top=audit.listed)  # type: ignore[arg-type]
            self.lists[f"susceptible-{run.stage}"] = ranked
        for name, record in records.items():
            if record is not None and reference is not None and record is not reference:
                flips = flipped(reference, record)
                self.lists[f"flips-{run.stage}-{name}"] = flips.head(audit.listed)
                self.images[name] = thumbnails(run, record, flips, dataset_of)

    def section(self, audit: BiasAudit) -> Section | None:
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


def flipped(first: Record, second: Record) -> pd.DataFrame:
    """Rows whose prediction differs, those the first model was surest of first."""
    a, b = first.outputs, second.outputs
    differs = a.predictions != b.predictions
    rows = np.flatnonzero(differs.any(axis=1) if differs.ndim == 2 else differs)
    column = differs[rows].argmax(axis=1) if differs.ndim == 2 else np.zeros(len(rows), int)

    def of(values: Any) -> Any:
        return values[rows, column] if values.ndim == 2 else values[rows]

    table: dict[str, Any] = {"id": rows if first.ids is None else first.ids[rows] % LOADER_STEP}
    table |= {name: [values[i] for i in rows] for name, values in first.features.items()}
    if a.task == "multilabel":
        table["target"] = column
    table |= {"label": of(a.labels), "before": of(a.predictions), "after": of(b.predictions)}
    for name, outputs in (("score_before", a), ("score_after", b)):
        if outputs.scores is not None:
            table[name] = outputs.scores.max(axis=1)[rows] if a.task == "multiclass" else of(outputs.scores)
    table["change"] = np.select(
        [table["before"] == table["label"], table["after"] == table["label"]], ["broken", "mended"], "other error"
    )
    frame = pd.DataFrame(table)
    if "score_before" not in frame:
        return frame
    sure = (frame["score_before"] - (0.5 if a.task != "multiclass" else 0)).abs()
    return frame.loc[sure.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def thumbnails(
    run: RunContext, record: Record, flips: pd.DataFrame, dataset_of: Callable[[int], Any]
) -> tuple[list[Any], list[str]]:
    """Images of the first flipped rows, where the data set can be indexed and holds images."""
    images: list[Any] = []
    titles: list[str] = []
    dataset = dataset_of(0)
    if record.ids is None or not hasattr(dataset, "__getitem__") or (record.ids >= LOADER_STEP).any():
        return images, titles
    with preserve_rng():  # a data set may draw random numbers
        for row in flips.head(IMAGES).to_dict("records"):
            try:
                inputs = run.fields(default_collate([dataset[int(row["id"])]])).inputs
            except (PluginError, TypeError, IndexError, KeyError):
                return [], []
            image = _image(inputs)
            if image is None:
                return [], []
            images.append(image)
            titles.append(f"{row['id']}: {row['label']}\n{row['before']} to {row['after']}")
    return images, titles


def _image(inputs: Any) -> Any:
    """``(H, W)`` or ``(H, W, 3)`` in [0, 1] of the only row of a batch, or None if it is no image."""
    if not isinstance(inputs, torch.Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    image = inputs[0].detach().float().cpu()
    low, high = float(image.min()), float(image.max())
    image = (image - low) / (high - low) if high > low else image * 0
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()


def section(results: Mapping[str, AuditResult]) -> Section:
    """Tables and pictures of the versions of one model; the first one is the model itself."""
    first = next(iter(results.values()))
    tables = [_verdicts(results), _tests(results)]
    pictures: list[Any] = []
    metrics = _shown(first)
    for feature in first.features:
        tables.append(_table(f"Groups of {feature}", _with_index(first.to_frame([feature]))))
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
    return flat.reset_index()


def _table(caption: str, frame: pd.DataFrame) -> Table:
    rows: Sequence[Any] = [plain(list(row)) for row in frame.itertuples(index=False, name=None)]
    return Table(caption, [str(c) for c in frame.columns], rows[:200])
