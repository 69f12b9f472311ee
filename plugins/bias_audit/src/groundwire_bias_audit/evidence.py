"""What an audit knows: sums by group, from rows or from a stream, that can be added up to marginals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_bias_audit.functional import Counts, Floats, confusion_counts, ratio
from groundwire_bias_audit.grouping import Groups
from groundwire_bias_audit.histogram import BAND, Bins, Histogram, score_metrics
from groundwire_bias_audit.inputs import Outputs, Task
from groundwire_bias_audit.row_scores import Rows, exact, top

#: Sums of a regression: rows, labels, predictions, absolute errors, squared errors, squared labels.
MOMENTS = ("count", "label", "prediction", "absolute", "squared", "label_squared")

#: Sums of squared weights of a regression, alone and times these.
SQUARES = ("count", "error", "absolute", "squared")


@dataclass(frozen=True)
class Evidence:
    """Sums by group.

    Attributes:
        task: Kind of the task.
        names: Of the targets.
        groups: The cells, which are the first axis of everything here.
        size: Rows of each cell, shape (G,).
        counts: ``[group, target, label, prediction]``; classes one against the rest; None for a regression.
        hits: ``[group, 1, 1, right]`` as confusion counts of "right", for a multiclass task's accuracy; else None.
        squares: Sums of squared weights in the shape of ``counts``; of a regression ``[group, SQUARES]``; None without
            weights.
        histogram: Scores, if known as a histogram; of the top class for a multiclass task.
        moments: ``[group, MOMENTS]`` for a regression.
        rows: The rows, if known.
    """

    task: Task
    names: tuple[Any, ...]
    groups: Groups
    size: Counts
    counts: Counts | None = None
    hits: Counts | None = None
    squares: Counts | None = None
    histogram: Histogram | None = None
    moments: Floats | None = None
    rows: Rows | None = None

    def of(self, features: Sequence[str]) -> Evidence:
        """The same by ``features`` (and the control features) only."""
        kept = self.groups.keep(features)
        if kept.names == self.groups.names:
            return self
        if kept.names not in self._marginals:
            self._marginals[kept.names] = self._of(kept, features)
        return self._marginals[kept.names]

    @cached_property
    def _marginals(self) -> dict[tuple[str, ...], Evidence]:
        """Those that were asked for: page, file and tables share their score metrics, which take the longest."""
        return {}

    def _of(self, kept: Groups, features: Sequence[str]) -> Evidence:

        def summed(values: Any) -> Any:
            return None if values is None else self.groups.marginal(values, features)

        histogram = self.histogram
        if histogram is not None:
            histogram = Histogram(summed(histogram.counts), summed(histogram.mass), histogram.bins)
        return replace(
            self, groups=kept, size=summed(self.size), counts=summed(self.counts), hits=summed(self.hits),
            squares=summed(self.squares), histogram=histogram, moments=summed(self.moments),
        )  # fmt: skip

    def overall(self) -> Evidence:
        """By the control features only, or all rows as one group without any."""
        controls = self.groups.controls
        if controls:
            names, levels = self.groups.names[:controls], self.groups.levels[:controls]
        else:
            names, levels = ("",), (("overall",),)
        shape = int(np.prod([len(level) for level in levels]))
        fold = self.groups.size // shape
        codes = None if self.groups.codes is None else self.groups.codes // fold

        def summed(values: Any) -> Any:
            return None if values is None else values.reshape(shape, fold, *values.shape[1:]).sum(axis=1)

        histogram = self.histogram
        if histogram is not None:
            histogram = Histogram(summed(histogram.counts), summed(histogram.mass), histogram.bins)
        return replace(
            self, groups=Groups(names, levels, 0, codes), size=summed(self.size), counts=summed(self.counts),
            hits=summed(self.hits), squares=summed(self.squares), histogram=histogram, moments=summed(self.moments),
        )  # fmt: skip

    @property
    def scored(self) -> bool:
        """Whether scores are known."""
        return self.histogram is not None or (self.rows is not None and self.rows.outputs.scores is not None)

    @cached_property
    def score_table(self) -> dict[str, Floats]:
        """AUC, calibration error and uncertainty ``[group, target]``; exact from rows, else from the histogram."""
        if not self.scored or self.task == "regression":
            return {}
        if self.rows is None:
            assert self.histogram is not None
            found = score_metrics(self.histogram)
        else:
            assert self.groups.codes is not None
            found = exact(self.rows, self.groups.codes, self.groups.size)
        if self.task == "multiclass":
            found.pop("roc_auc")
        return found

    def confident(self) -> Counts | None:
        """``[group, target, label, prediction, certain]`` of a task with scores and labels 0 and 1, else None."""
        if not self.scored or self.task not in ("binary", "multilabel"):
            return None
        if self.rows is None:
            assert self.histogram is not None
            return self.histogram.confident
        outputs, codes = self.rows.outputs, self.groups.codes
        assert outputs.scores is not None
        assert codes is not None
        low, high = (outputs.scores.dtype.type(end) for end in BAND)
        certain = (outputs.scores <= low) | (outputs.scores >= high)
        cells = codes.astype(np.int64)[:, None] * 8 + outputs.labels * 4 + outputs.predictions * 2 + certain
        size = self.groups.size
        return np.stack([np.bincount(c, minlength=8 * size).reshape(size, 2, 2, 2) for c in cells.T], axis=1)

    @cached_property
    def score_histogram(self) -> Histogram | None:
        """The scores as a histogram, also from rows."""
        if self.histogram is not None or self.rows is None or self.rows.outputs.scores is None:
            return self.histogram
        labels, scores = top(self.rows.outputs)
        assert self.groups.codes is not None
        return Histogram.of(self.groups.codes, labels, scores, self.groups.size, Bins.make(scores.dtype))


def gather(outputs: Outputs, groups: Groups, weights: Floats | None = None) -> Evidence:
    """Evidence of rows."""
    assert groups.codes is not None
    codes, size = groups.codes, groups.size
    rows = Rows(outputs, weights)
    if outputs.task == "regression":
        moments = _moments(outputs, codes, size, weights)
        squared = None if weights is None else _squared_weights(outputs, codes, size, weights)
        count = np.bincount(codes.astype(np.int64), minlength=size)
        return Evidence("regression", ("",), groups, count, squares=squared, moments=moments, rows=rows)
    labels, predictions = outputs.targets
    counts = _stacked(codes, labels, predictions, size, weights)
    squares = None if weights is None else _stacked(codes, labels, predictions, size, weights**2)
    hits, count = None, counts[:, 0].sum(axis=(1, 2))
    if outputs.task == "multiclass":
        ones = np.ones((len(codes), 1), np.uint8)
        hits = _stacked(codes, ones, outputs.correct[:, None], size, weights)
    if weights is not None:
        count = np.bincount(codes.astype(np.int64), minlength=size)
    return Evidence(outputs.task, outputs.names, groups, count, counts, hits, squares, rows=rows)


def _stacked(
    codes: NDArray[Any], labels: NDArray[Any], predictions: NDArray[Any], size: int, weights: Floats | None
) -> Counts:
    columns = range(labels.shape[1])
    if weights is None:
        return np.stack([confusion_counts(codes, labels[:, t], predictions[:, t], size) for t in columns], axis=1)
    cells = [codes.astype(np.int64) * 4 + labels[:, t] * 2 + predictions[:, t] for t in columns]
    return np.stack([np.bincount(c, weights, minlength=4 * size).reshape(size, 2, 2) for c in cells], axis=1)


def _moments(outputs: Outputs, codes: NDArray[Any], size: int, weights: Floats | None) -> Floats:
    y, error = outputs.labels, outputs.predictions - outputs.labels
    weights = np.ones(len(y)) if weights is None else weights
    values = (np.ones(len(y)), y, outputs.predictions, np.abs(error), error**2, y**2)
    return np.stack([np.bincount(codes, value * weights, minlength=size) for value in values], axis=1)


def _squared_weights(outputs: Outputs, codes: NDArray[Any], size: int, weights: Floats) -> Floats:
    error = outputs.predictions - outputs.labels
    values = (np.ones_like(error), error, np.abs(error), error**2)
    assert len(values) == len(SQUARES)
    return np.stack([np.bincount(codes, value * weights**2, minlength=size) for value in values], axis=1)


def regression_table(moments: Floats) -> dict[str, Floats]:
    """Means of a regression by group from their sums.

    Example:
        >>> found = regression_table(np.array([[2.0, 3.0, 4.0, 1.0, 1.0, 5.0]]))
        >>> {name: float(value[0]) for name, value in found.items()}["mean_absolute_error"]
        0.5
    """
    n, label, prediction, absolute, squared, label_squared = np.moveaxis(moments, -1, 0)
    mean = ratio(label, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = ratio(label_squared, n) - mean**2
        r2 = np.where(variance > 0, 1 - ratio(squared, n) / variance, np.nan)
    return {
        "mean_label": mean,
        "mean_prediction": ratio(prediction, n),
        "mean_error": ratio(prediction - label, n),
        "mean_absolute_error": ratio(absolute, n),
        "mean_squared_error": ratio(squared, n),
        "r2_score": r2,
    }
