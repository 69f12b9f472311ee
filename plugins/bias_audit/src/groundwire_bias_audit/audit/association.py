"""The paper's questions that no library answers: bias amplification, interdependence, under-prediction of rare values.

After E. Iofinova, A. Peste, D. Alistarh, *Bias in Pruned Vision Models*, 2023. Undefined cases are NaN here, where a
literal reading divides by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from groundwire_bias_audit.audit.rates import Counts, Floats, ratio


@dataclass(frozen=True)
class Amplification:
    """Bias amplification of one target for one binary attribute.

    Attributes:
        value: Share of predicted positives with the associated attribute value, minus that share among true positives;
            above 0 the association of the training data is amplified. NaN if undefined or not eligible.
        associated: The attribute value (0 or 1) with which the target occurs more often in training.
        reason: Why ``value`` is NaN, else "".
    """

    value: float
    associated: int | None
    reason: str = ""


def bias_amplification(
    counts: ArrayLike, training: ArrayLike | None = None, *, min_positives: int = 10, min_association: float = 0.1
) -> Amplification:
    """Bias amplification from counts.

    With f_s the training frequency of y = 1 where the attribute is s, and k the s with the larger f:
    BA = #(pred = 1, s = k) / #(pred = 1) - #(y = 1, s = k) / #(y = 1).
    Eligible only if y has ``min_positives`` in either attribute value of the audited data, and
    |f1 - f0| / min(f1, f0) is at least ``min_association``.

    Args:
        counts: ``[attribute value, label, prediction]``, shape (2, 2, 2), of the audited data.
        training: ``[attribute value, label]`` of the training data; the audited labels when left out.
        min_positives: 0 for none.
        min_association: 0 for none.

    Example:
        >>> counts = [[[80, 0], [10, 10]], [[60, 10], [0, 40]]]
        >>> found = bias_amplification(counts)
        >>> round(found.value, 3), found.associated
        (0.167, 1)
    """
    cells = np.asarray(counts)
    train = cells.sum(axis=2) if training is None else np.asarray(training)
    positives, predicted = cells[:, 1].sum(axis=1), cells[:, :, 1].sum(axis=1)
    if positives.min() < min_positives:
        return Amplification(np.nan, None, f"fewer than {min_positives} positives in a group")
    f0, f1 = ratio(train[:, 1], train.sum(axis=1))
    if not min(f0, f1) > 0:
        return Amplification(np.nan, None, "the label never occurs in a group of the training data")
    if f0 == f1 or abs(f1 - f0) / min(f0, f1) < min_association:
        return Amplification(np.nan, None, "hardly any association in the training data")
    k = int(f1 > f0)
    if not predicted.sum():
        return Amplification(np.nan, k, "nothing is predicted positive")
    if not positives.sum():
        return Amplification(np.nan, k, "nothing is positive")
    return Amplification(float(predicted[k] / predicted.sum() - positives[k] / positives.sum()), k)


def rare_value_ratio(counts: ArrayLike, training_rate: float | None = None) -> float:
    """Return how often the rarer value is predicted, relative to how often it occurs.

    Below 1 the value that is rarer in training is under-predicted; 1 is calibrated; NaN where it never occurs.

    Args:
        counts: ``[label, prediction]``, shape (2, 2), of the audited data.
        training_rate: Share of y = 1 in training; the audited one when left out.

    Example:
        >>> rare_value_ratio([[85, 5], [5, 5]]), rare_value_ratio([[5, 5], [0, 90]])
        (1.0, 0.5)
    """
    cells = np.asarray(counts)
    labels, predictions = cells.sum(axis=1), cells.sum(axis=0)
    if not cells.sum():
        return float("nan")
    share = labels[1] / labels.sum() if training_rate is None else training_rate
    rare = 0 if share > 0.5 else 1
    return float(ratio(predictions[rare], labels[rare]))


def gram(predictions: NDArray[np.integer]) -> Counts:
    """Sums of products of hard predictions and a constant, all that :func:`interdependence` needs; they add up.

    Args:
        predictions: 0 or 1, shape (n, A).

    Returns:
        int64, shape (A + 1, A + 1); row and column 0 belong to the constant 1.

    Example:
        >>> gram(np.array([[1, 0], [1, 1]])).tolist()
        [[2, 2, 1], [2, 2, 1], [1, 1, 1]]
    """
    rows = np.concatenate([np.ones((len(predictions), 1)), predictions], axis=1)
    found: Counts = np.rint(rows.T @ rows).astype(np.int64)
    return found


def interdependence(products: Counts) -> Floats:
    """Measure how well the other outputs predict each output: in-sample R^2 of least squares on hard predictions.

    Args:
        products: From :func:`gram`, shape (A + 1, A + 1).

    Returns:
        Shape (A,), in [0, 1]; NaN for an output that is always or never predicted, and with fewer than two outputs.

    Example:
        >>> y = np.array([[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
        >>> interdependence(gram(y)).round(6).tolist()
        [1.0, 1.0, 0.0]
    """
    products = np.asarray(products, dtype=float)
    size = len(products) - 1
    found = np.full(size, np.nan)
    n = products[0, 0]
    for j in range(1, size + 1) if size > 1 and n else ():
        others = [0, *(i for i in range(1, size + 1) if i != j)]
        total = products[j, j] - products[0, j] ** 2 / n
        if total <= 0:
            continue
        target = products[others, j]
        # Outputs may repeat each other; the smallest solution has the same fit.
        weights = np.linalg.lstsq(products[np.ix_(others, others)], target, rcond=1e-10)[0]
        found[j - 1] = np.clip((weights @ target - products[0, j] ** 2 / n) / total, 0.0, 1.0)
    return found
