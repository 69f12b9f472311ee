"""Counts of an audit by group, from rows or from a stream, that can be added up to marginals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_bias_audit.audit.groups import Groups
from groundwire_bias_audit.audit.predictions import Outputs, Task
from groundwire_bias_audit.audit.rates import Counts, Floats, confusion_counts
from groundwire_bias_audit.audit.score_metrics import (
    BAND,
    Bins,
    Histogram,
    Rows,
    exact_score_metrics,
    score_metrics,
    top_scores,
)

#: Sums of squared weights of a regression, alone and times these.
SQUARED = ("count", "error", "absolute", "squared")


@dataclass(frozen=True)
class GroupCounts:
    """Sums of an audit by group.

    Attributes:
        task: Kind of the task.
        names: Of the targets.
        groups: The cells, which are the first axis of everything here.
        size: Rows of each cell, shape (G,).
        confusion: ``[group, target, label, prediction]``; classes one against the rest; None for a regression.
        correct: ``[group, 1, 1, right]`` as confusion counts of "right", for a multiclass task's accuracy; else None.
        squared_weights: Sums of squared weights in the shape of ``confusion``; of a regression ``[group, SQUARED]``;
            None without weights.
        histogram: Scores, if known as a histogram; of the top class for a multiclass task.
        moments: ``[group, MOMENTS]`` for a regression.
        rows: The rows, if known.
    """

    task: Task
    names: tuple[Any, ...]
    groups: Groups
    size: Counts
    confusion: Counts | None = None
    correct: Counts | None = None
    squared_weights: Counts | None = None
    histogram: Histogram | None = None
    moments: Floats | None = None
    rows: Rows | None = None

    def of(self, features: Sequence[str]) -> GroupCounts:
        """The same by ``features`` (and the control features) only."""
        groups = self.groups.keep(features)
        if groups.names == self.groups.names:
            return self
        if groups.names not in self._marginals:
            add = partial(self.groups.marginal, names=features)
            self._marginals[groups.names] = self._summed(groups, add)
        return self._marginals[groups.names]

    @cached_property
    def _marginals(self) -> dict[tuple[str, ...], GroupCounts]:
        """Those that were asked for: page, file and tables share their score metrics, which take the longest."""
        return {}

    def overall(self) -> GroupCounts:
        """By the control features only, or all rows as one group without any."""
        controls = self.groups.controls
        names, levels = self.groups.names[:controls], self.groups.levels[:controls]
        if not controls:
            names, levels = ("",), (("overall",),)
        blocks = math.prod(map(len, levels))
        fold = self.groups.size // blocks
        codes = None if self.groups.codes is None else self.groups.codes // fold
        groups = Groups(names, levels, 0, codes)
        return self._summed(groups, lambda values: values.reshape(blocks, fold, *values.shape[1:]).sum(axis=1))

    def _summed(self, groups: Groups, add: Callable[[Counts], Counts]) -> GroupCounts:
        """The same by ``groups``; ``add`` sums an array over the cells of each of them."""

        def summed(values: Any) -> Any:
            return None if values is None else add(values)

        histogram = self.histogram
        if histogram is not None:
            histogram = Histogram(add(histogram.counts), add(histogram.mass), histogram.bins)
        return replace(
            self, groups=groups, size=add(self.size), confusion=summed(self.confusion), correct=summed(self.correct),
            squared_weights=summed(self.squared_weights), histogram=histogram, moments=summed(self.moments),
        )  # fmt: skip

    @property
    def scored(self) -> bool:
        """True if scores are known."""
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
            found = exact_score_metrics(self.rows, self.groups.codes, self.groups.size)
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
        labels, scores = top_scores(self.rows.outputs)
        assert self.groups.codes is not None
        return Histogram.of(self.groups.codes, labels, scores, self.groups.size, Bins.make(scores.dtype))


def group_counts(outputs: Outputs, groups: Groups, weights: Floats | None = None) -> GroupCounts:
    """Count rows by group."""
    assert groups.codes is not None
    codes, size = groups.codes, groups.size
    rows = Rows(outputs, weights)
    if outputs.task == "regression":
        moments = _moments(outputs, codes, size, weights)
        squared = None if weights is None else _squared_weights(outputs, codes, size, weights)
        count = np.bincount(codes.astype(np.int64), minlength=size)
        return GroupCounts("regression", ("",), groups, count, squared_weights=squared, moments=moments, rows=rows)
    labels, predictions = outputs.targets
    counts = _stacked(codes, labels, predictions, size, weights)
    squares = None if weights is None else _stacked(codes, labels, predictions, size, weights**2)
    hits, count = None, counts[:, 0].sum(axis=(1, 2))
    if outputs.task == "multiclass":
        ones = np.ones((len(codes), 1), np.uint8)
        hits = _stacked(codes, ones, outputs.correct[:, None], size, weights)
    if weights is not None:
        count = np.bincount(codes.astype(np.int64), minlength=size)
    return GroupCounts(outputs.task, outputs.names, groups, count, counts, hits, squares, rows=rows)


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
    assert len(values) == len(SQUARED)
    return np.stack([np.bincount(codes, value * weights**2, minlength=size) for value in values], axis=1)
