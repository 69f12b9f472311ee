"""AUC, calibration error and uncertainty of scores: exactly from rows, and from integer histograms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.metrics import auc as area
from sklearn.metrics import roc_curve
from torchmetrics.functional.classification import binary_calibration_error

from groundwire_bias_audit.audit.predictions import Outputs
from groundwire_bias_audit.audit.rates import Counts, Floats, ratio

BINS = 1000
#: Scores between these, both excluded, are uncertain.
BAND = (0.1, 0.9)
#: Unit of the sums of scores: integers add up alike in any order.
FIXED = 2**32


@dataclass(frozen=True)
class Bins:
    """Cuts of [0, 1] for scores of one floating type and one threshold.

    Attributes:
        edges: Lower edges, ascending, of the type of the scores; the last bin holds exactly 1.
        threshold: Predicted 1 where score >= threshold.

    Example:
        >>> bins = Bins.make(np.float64, 0.5)
        >>> bins.of(np.array([0.0, 0.4999, 0.5, 1.0])).tolist(), len(bins.edges)
        ([0, 500, 501, 1001], 1002)
    """

    edges: NDArray[Any]
    threshold: float

    @classmethod
    def make(cls, dtype: Any, threshold: float = 0.5) -> Bins:
        """Edges at all multiples of 1/1000, just above the lower end of the band, and at ``threshold``."""
        kind = np.dtype(dtype)
        grid = np.arange(BINS + 1) / BINS
        above = np.nextafter(kind.type(BAND[0]), kind.type(1))
        edges = np.unique(np.concatenate([grid.astype(kind), [above], [kind.type(threshold)]]).astype(kind))
        return cls(edges[(edges >= 0) & (edges <= 1)], threshold)

    def of(self, scores: NDArray[Any]) -> NDArray[np.int64]:
        """Bin of each score in [0, 1]."""
        found: NDArray[np.int64] = np.searchsorted(self.edges, scores.astype(self.edges.dtype), side="right") - 1
        return found

    @property
    def positive(self) -> int:
        """First bin that is predicted 1."""
        return int(np.searchsorted(self.edges, self.edges.dtype.type(self.threshold), side="left"))

    @property
    def uncertain(self) -> slice:
        """Bins inside the band."""
        low, high = (self.edges.dtype.type(end) for end in BAND)
        return slice(
            int(np.searchsorted(self.edges, low, side="right")), int(np.searchsorted(self.edges, high, side="left"))
        )

    @property
    def buckets(self) -> NDArray[np.int64]:
        """First bin of each of the calibration error's buckets [0, .1), [.1, .2), ..., [.9, 1), {1}."""
        tenths = (np.arange(11) / 10).astype(self.edges.dtype)
        return np.searchsorted(self.edges, tenths, side="left")


@dataclass(frozen=True)
class Histogram:
    """Counts of scores, and their sums by bucket in units of 2**-32.

    Attributes:
        counts: int64 ``[group, target, label, bin]``.
        mass: int64 ``[group, target, bucket]``.
        bins: The cuts.
    """

    counts: Counts
    mass: Counts
    bins: Bins

    @classmethod
    def empty(cls, groups: int, targets: int, bins: Bins) -> Histogram:
        """No row yet."""
        counts = np.zeros((groups, targets, 2, len(bins.edges)), np.int64)
        return cls(counts, np.zeros((groups, targets, 11), np.int64), bins)

    @classmethod
    def of(cls, codes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any], groups: int, bins: Bins) -> Histogram:
        """Histogram of rows.

        Args:
            codes: Group of each row, shape (n,).
            labels: 0 or 1, shape (n, T).
            scores: In [0, 1], shape (n, T).
            groups: Number of groups.
            bins: The cuts.
        """
        targets, width = scores.shape[1], len(bins.edges)
        cell = codes.astype(np.int64)[:, None] * targets + np.arange(targets)
        found = bins.of(scores)
        code = (cell * 2 + labels) * width + found
        counts = np.bincount(code.ravel(), minlength=groups * targets * 2 * width)
        bucket = np.searchsorted(bins.buckets, found, side="right") - 1
        fixed = np.rint(scores.astype(np.float64) * FIXED).astype(np.int64)
        mass = np.zeros(groups * targets * 11, np.int64)
        np.add.at(mass, (cell * 11 + bucket).ravel(), fixed.ravel())
        return cls(counts.reshape(groups, targets, 2, width), mass.reshape(groups, targets, 11), bins)

    @property
    def confusion(self) -> Counts:
        """``[group, target, label, prediction]``."""
        return np.add.reduceat(self.counts, [0, self.bins.positive], axis=-1) if self._cut else self._one_sided()

    @property
    def _cut(self) -> bool:
        return 0 < self.bins.positive < len(self.bins.edges)

    def _one_sided(self) -> Counts:
        total, none = self.counts.sum(axis=-1), np.zeros(self.counts.shape[:-1], np.int64)
        return np.stack([none, total] if self.bins.positive == 0 else [total, none], axis=-1)

    @property
    def confident(self) -> Counts:
        """``[group, target, label, prediction, certain]``: certain is 0 inside the band and 1 outside."""
        inside = np.zeros_like(self.counts)
        inside[..., self.bins.uncertain] = self.counts[..., self.bins.uncertain]
        unsure = Histogram(inside, self.mass, self.bins).confusion
        return np.stack([unsure, self.confusion - unsure], axis=-1)

    def sum(self) -> Histogram:
        """All groups as one."""
        return Histogram(self.counts.sum(axis=0, keepdims=True), self.mass.sum(axis=0, keepdims=True), self.bins)


def auc(counts: Counts) -> Floats:
    """Area under the ROC curve from ``[..., label, bin]``; scores of one bin are ties. NaN without both labels.

    Example:
        >>> float(auc(np.array([[2, 1, 0], [0, 1, 2]])))
        0.9444444444444444
    """
    negatives, positives = counts[..., 0, :].astype(float), counts[..., 1, :].astype(float)
    below = np.cumsum(negatives, axis=-1) - negatives
    wins = (positives * (below + negatives / 2)).sum(axis=-1)
    return ratio(wins, negatives.sum(axis=-1) * positives.sum(axis=-1))


def calibration_error(counts: Counts, mass: Counts, bins: Bins) -> Floats:
    """Expected calibration error with ten buckets: sum of n_b / n * |mean score_b - mean label_b|.

    Args:
        counts: ``[..., label, bin]``.
        mass: ``[..., bucket]``, sums of scores in units of 2**-32.
        bins: The cuts.

    Returns:
        In [0, 1]; NaN without rows. Equal to torchmetrics' ``BinaryCalibrationError(n_bins=10, norm="l1")``.
    """
    by_bucket = np.add.reduceat(counts, bins.buckets, axis=-1)
    gap = np.abs(mass / FIXED - by_bucket[..., 1, :])
    return ratio(gap.sum(axis=-1), by_bucket.sum(axis=(-2, -1)))


def uncertainty(counts: Counts, bins: Bins) -> Floats:
    """Share of scores strictly between 0.1 and 0.9; NaN without rows."""
    return ratio(counts[..., bins.uncertain].sum(axis=(-2, -1)), counts.sum(axis=(-2, -1)))


def score_metrics(histogram: Histogram) -> dict[str, Floats]:
    """AUC, calibration error and uncertainty of each group and target.

    Example:
        >>> bins = Bins.make(np.float64)
        >>> rows = (np.zeros(4, int), np.array([[0], [0], [1], [1]]), np.array([[0.05], [0.4], [0.3], [0.95]]))
        >>> found = score_metrics(Histogram.of(*rows, 1, bins))
        >>> {name: round(float(value[0, 0]), 3) for name, value in found.items()}
        {'roc_auc': 0.75, 'calibration_error': 0.3, 'uncertainty': 0.5}
    """
    return {
        "roc_auc": auc(histogram.counts),
        "calibration_error": calibration_error(histogram.counts, histogram.mass, histogram.bins),
        "uncertainty": uncertainty(histogram.counts, histogram.bins),
    }


@dataclass(frozen=True)
class Rows:
    """The rows themselves, for what sums cannot tell exactly."""

    outputs: Outputs
    weights: Floats | None = None


def top_scores(outputs: Outputs) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels and scores ``(n, T)``; of a multiclass task whether the top class is right, and its score."""
    assert outputs.scores is not None
    if outputs.task == "multiclass":
        return outputs.correct[:, None].astype(np.uint8), outputs.scores.max(axis=1)[:, None]
    return outputs.labels, outputs.scores


def exact_score_metrics(rows: Rows, codes: NDArray[Any], groups: int) -> dict[str, Floats]:
    """AUC, calibration error and uncertainty ``[group, target]``; NaN where they are undefined.

    Args:
        rows: Labels, scores and weights.
        codes: Group of each row.
        groups: Number of groups.
    """
    labels, scores = top_scores(rows.outputs)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(groups + 1))
    shape = (groups, scores.shape[1])
    found = {name: np.full(shape, np.nan) for name in ("roc_auc", "calibration_error", "uncertainty")}
    for group in range(groups):
        inside = order[bounds[group] : bounds[group + 1]]
        for target in range(shape[1]) if len(inside) else ():
            y, p = labels[inside, target], scores[inside, target]
            w = None if rows.weights is None else rows.weights[inside]
            for name, function in (("roc_auc", _auc), ("calibration_error", _ece), ("uncertainty", _unsure)):
                found[name][group, target] = function(y, p, w)
    return found


def _auc(y: NDArray[Any], p: NDArray[Any], w: Floats | None) -> float:
    """As ``roc_auc_score``, which takes thrice as long over a group: it looks again at what was checked before."""
    if not 0 < y.sum() < len(y):
        return float("nan")
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        false_positive, true_positive, _ = roc_curve(y, p, sample_weight=w)
        return float(area(false_positive, true_positive))


def _ece(y: NDArray[Any], p: NDArray[Any], w: Floats | None) -> float:
    if w is None:
        labels, scores = torch.as_tensor(y.astype(np.int64)), torch.as_tensor(p)
        return float(binary_calibration_error(scores, labels, n_bins=10, validate_args=False))
    bucket = np.searchsorted((np.arange(11) / 10).astype(p.dtype), p, side="right")
    gap = np.bincount(bucket, w * (p - y))
    return float(np.abs(gap).sum() / w.sum())


def _unsure(y: NDArray[Any], p: NDArray[Any], w: Floats | None) -> float:
    low, high = (p.dtype.type(end) for end in BAND)
    inside = (p > low) & (p < high)
    return float(np.average(inside, weights=w))
