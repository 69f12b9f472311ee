"""Group metrics as ratios of counts: the arithmetic of an audit, without Lightning and without rows.

Everything starts from the confusion counts ``[group, label, prediction]``. They are integers, so they add up over
batches and processes without rounding, and a rate is one division.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]
_TN, _FP, _FN, _TP = (0, 0), (0, 1), (1, 0), (1, 1)
_ALL = (_TN, _FP, _FN, _TP)
_POSITIVES, _NEGATIVES = (_FN, _TP), (_TN, _FP)
#: Numerator and denominator of each rate, as cells (label, prediction). Names are fairlearn's and scikit-learn's.
RATES: dict[str, tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]] = {
    "accuracy": ((_TN, _TP), _ALL),
    "selection_rate": ((_FP, _TP), _ALL),
    "true_positive_rate": ((_TP,), _POSITIVES),
    "true_negative_rate": ((_TN,), _NEGATIVES),
    "false_positive_rate": ((_FP,), _NEGATIVES),
    "false_negative_rate": ((_FN,), _POSITIVES),
    "precision": ((_TP,), (_FP, _TP)),
    "base_rate": (_POSITIVES, _ALL),
}


def confusion_counts(groups: ArrayLike, y_true: ArrayLike, y_pred: ArrayLike, n_groups: int) -> Counts:
    """Count rows by group, label and prediction.

    Args:
        groups: Shape (n,), integers in [0, n_groups).
        y_true: Shape (n,), labels 0 or 1 (or bool).
        y_pred: Shape (n,), predictions 0 or 1 (or bool).
        n_groups: Number of groups G.

    Returns:
        int64 array of shape (G, 2, 2): ``[group, label, prediction]``.

    Example:
        >>> confusion_counts([0, 0, 1], [0, 1, 1], [1, 1, 0], 2).tolist()
        [[[0, 1], [0, 1]], [[0, 0], [1, 0]]]
    """
    dtype = np.uint8 if n_groups <= 64 else np.int64
    code: NDArray[Any] = np.asarray(groups).astype(dtype)
    np.multiply(code, 4, out=code)
    np.add(code, _bits(y_true, 1), out=code)
    np.add(code, _bits(y_pred, 0), out=code)
    return _histogram(code, 4 * n_groups).reshape(n_groups, 2, 2)


def _bits(values: ArrayLike, shift: int) -> NDArray[Any]:
    bits = np.asarray(values)
    bits = bits.view(np.uint8) if bits.dtype == bool else bits.astype(np.uint8)
    return bits << shift if shift else bits


def _histogram(code: NDArray[Any], size: int) -> Counts:
    """``np.bincount``; two one-byte codes are read as one of two bytes, which halves the work."""
    if code.dtype != np.uint8 or len(code) < 65536:
        return np.bincount(code, minlength=size)
    even = len(code) // 2 * 2
    pairs = np.bincount(code[:even].view(np.uint16), minlength=65536).reshape(256, 256)
    both: Counts = pairs.sum(axis=0) + pairs.sum(axis=1)
    if even < len(code):
        both[code[-1]] += 1
    return both[:size]


def parts(counts: Counts, metric: str) -> tuple[Counts, Counts]:
    """Numerator and denominator of ``metric`` from confusion counts ``[..., label, prediction]``.

    Example:
        >>> [int(part) for part in parts(np.array([[8, 2], [1, 4]]), "true_positive_rate")]
        [4, 5]
    """
    numerator, denominator = RATES[metric]
    return sum(counts[..., y, p] for y, p in numerator), sum(counts[..., y, p] for y, p in denominator)  # type: ignore[return-value]


def ratio(numerator: Counts, denominator: Counts) -> Floats:
    """``numerator / denominator`` in float64, NaN where the denominator is 0: an undefined rate is not a rate of 0.

    Example:
        >>> ratio(np.array([1, 0]), np.array([2, 0])).tolist()
        [0.5, nan]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, np.true_divide(numerator, denominator))


def rate(counts: Counts, metric: str) -> Floats:
    """``metric`` of each group from confusion counts ``[..., label, prediction]``; NaN where it is undefined.

    Example:
        >>> rate(np.array([[[8, 2], [1, 4]], [[5, 5], [0, 0]]]), "true_positive_rate").tolist()
        [0.8, nan]
    """
    return ratio(*parts(counts, metric))


def spread(by_group: Floats, overall: ArrayLike, axis: int = 0) -> dict[str, Floats]:
    """Return what fairlearn's ``MetricFrame`` derives from values by group; NaN groups are left out, as there.

    Args:
        by_group: Values by group along ``axis``.
        overall: The same metric over all rows, without that axis.
        axis: The group axis.

    Returns:
        ``group_min``, ``group_max``, and differences and ratios: ``difference`` and ``ratio`` between groups
        (max - min, min / max), ``difference_to_overall`` (largest absolute) and ``ratio_to_overall`` (smallest, of
        each ratio or its inverse, whichever is at most 1).

    Example:
        >>> found = spread(np.array([0.5, 0.8, np.nan]), 0.6)
        >>> round(float(found["difference"]), 9), float(found["ratio"])
        (0.3, 0.625)
    """
    overall = np.expand_dims(np.asarray(overall, dtype=float), axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.fmin.reduce(by_group, axis=axis), np.fmax.reduce(by_group, axis=axis)
        to_overall = by_group / overall
        # As fairlearn: the inverse is taken of the rounded ratio.
        to_overall = np.where(to_overall > 1, 1 / to_overall, to_overall)
        return {
            "group_min": low,
            "group_max": high,
            "difference": high - low,
            "difference_to_overall": np.fmax.reduce(np.abs(by_group - overall), axis=axis),
            "ratio": low / high,
            "ratio_to_overall": np.fmin.reduce(to_overall, axis=axis),
        }


def disaggregate(counts: Counts, metrics: tuple[str, ...]) -> dict[str, dict[str, Floats]]:
    """Every aggregate of every metric from confusion counts, equal to fairlearn's where fairlearn defines it.

    Args:
        counts: Shape (G, 2, 2).
        metrics: Names in :data:`RATES`.

    Returns:
        By metric: ``by_group`` of shape (G,), ``overall``, and the entries of :func:`spread`.

    Example:
        >>> found = disaggregate(np.array([[[8, 2], [1, 4]], [[5, 5], [5, 5]]]), ("accuracy",))
        >>> found["accuracy"]["by_group"].tolist(), round(float(found["accuracy"]["overall"]), 3)
        ([0.8, 0.5], 0.629)
    """
    total, result = counts.sum(axis=0), {}
    for metric in metrics:
        by_group, overall = rate(counts, metric), rate(total, metric)
        result[metric] = {"by_group": by_group, "overall": overall, **spread(by_group, overall)}
    return result


#: Sums of a regression: rows, labels, predictions, absolute errors, squared errors, squared labels.
MOMENTS = ("count", "label", "prediction", "absolute", "squared", "label_squared")


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
