"""Countermeasures without training again: moved thresholds, and labels by people where the dense model is unsure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from fairlearn.postprocessing import ThresholdOptimizer
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from groundwire_bias_audit.audit.association import bias_amplification
from groundwire_bias_audit.audit.groups import Groups, read_groups
from groundwire_bias_audit.audit.rates import Floats, confusion_counts, rate, spread
from groundwire_bias_audit.audit.susceptibility import susceptibility


def recalibrate_thresholds(y_true: ArrayLike, scores: ArrayLike) -> Floats:
    """Thresholds at which each target is predicted as often as it occurs, from validation data.

    The k-th largest score, k the number of positives, so that ``score >= threshold`` predicts k rows; with ties at the
    threshold the nearest count on either side. With k = 0 nothing is predicted (a threshold just above the largest).

    Args:
        y_true: 0 or 1, shape (n,) or (n, T).
        scores: Of the same shape; probabilities or logits.

    Returns:
        Shape () or (T,).

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> float(recalibrate_thresholds([1, 0, 0, 1], [0.4, 0.1, 0.2, 0.3]))
        0.3
    """
    labels, values = np.asarray(y_true), np.asarray(scores, dtype=float)
    if labels.shape != values.shape or not len(labels):
        raise ValueError(f"labels of shape {labels.shape} and scores of shape {values.shape} do not fit")
    if labels.ndim == 1:
        return np.asarray(_threshold(int(labels.sum()), values))
    return np.array([_threshold(int(labels[:, t].sum()), values[:, t]) for t in range(labels.shape[1])])


def _threshold(k: int, values: NDArray[np.float64]) -> float:
    above = float(np.nextafter(values.max(), np.inf))
    cuts = np.append(np.unique(values), above)
    predicted = len(values) - np.searchsorted(np.sort(values), cuts, side="left")
    return float(cuts[np.argmin(np.abs(predicted - k))])


class _Scored(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier whose only feature is its score."""

    def __init__(self) -> None:
        self.classes_ = np.array([0, 1])

    def fit(self, x: Any, y: Any) -> _Scored:
        return self

    def predict_proba(self, x: Any) -> NDArray[Any]:
        p = np.asarray(x, dtype=float).reshape(-1)
        return np.stack([1 - p, p], axis=1)

    def predict(self, x: Any) -> NDArray[Any]:
        return (np.asarray(x).reshape(-1) >= 0.5).astype(int)


class GroupThresholds:
    """Thresholds by group, by fairlearn's ``ThresholdOptimizer`` on scores.

    They use the group at prediction time, which not every law allows, and are randomised where the constraint needs it.

    Args:
        constraint: Of fairlearn: "equalized_odds", "demographic_parity", "true_positive_rate_parity", ...
        objective: What to maximise under it.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y, g = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
        >>> p = np.clip(0.25 + 0.4 * y - 0.2 * g + 0.2 * rng.random(400), 0, 1)
        >>> fitted = GroupThresholds("true_positive_rate_parity").fit(y, p, g)
        >>> set(fitted.predict(p, g).tolist()) == {0, 1}
        True
    """

    def __init__(self, constraint: str = "equalized_odds", objective: str = "balanced_accuracy_score") -> None:
        self.constraint, self.objective = constraint, objective

    def fit(self, y_true: ArrayLike, scores: ArrayLike, sensitive_features: Any) -> GroupThresholds:
        """Choose thresholds on validation data.

        Raises:
            ValueError: A group has only one label (fairlearn's message).
        """
        self.optimizer = ThresholdOptimizer(
            estimator=_Scored(), constraints=self.constraint, objective=self.objective, prefit=True,
            predict_method="predict_proba",
        )  # fmt: skip
        x = np.asarray(scores, dtype=float).reshape(-1, 1)
        self.optimizer.fit(x, np.asarray(y_true), sensitive_features=_codes(sensitive_features, len(x)))
        return self

    def predict(self, scores: ArrayLike, sensitive_features: Any, *, random_state: int = 0) -> NDArray[np.int64]:
        """Predictions for scores and groups."""
        x = np.asarray(scores, dtype=float).reshape(-1, 1)
        groups = _codes(sensitive_features, len(x))
        found = self.optimizer.predict(x, sensitive_features=groups, random_state=random_state)
        return np.asarray(found).astype(np.int64)


def _codes(features: Any, rows: int) -> NDArray[Any]:
    """Group names as text: stable between fit and predict, and missing values are a group."""
    groups = read_groups(features, rows=rows)
    assert groups.codes is not None
    names = np.array([str(name) for name in groups.index])
    found: NDArray[Any] = names[groups.codes]
    return found


def compare_override(
    y_true: ArrayLike,
    scores: ArrayLike,
    sensitive_features: Any,
    *,
    dense_scores: ArrayLike | None = None,
    budgets: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    draws: int = 100,
    random_state: int = 0,
) -> pd.DataFrame:
    """Replace the predictions of some rows by their true labels: the uncertain ones, against as many at random.

    Args:
        y_true: Labels 0 or 1, shape (n,).
        scores: P(y=1) of the model in use, shape (n,).
        sensitive_features: One feature or several, crossed.
        dense_scores: Scores that say which rows are uncertain (those of the dense model); ``scores`` when left out.
        budgets: Shares of rows to label.
        draws: Random choices of rows to compare with.
        random_state: Their seed.

    Returns:
        Index: the budget, 0 (no override) first. Columns: ``accuracy_gap``, ``true_positive_rate_gap``,
        ``worst_group`` (lowest accuracy of a group) and ``amplification`` (largest |BA|, without eligibility rules)
        after overriding uncertain rows, and the same with ``random_`` (mean) and ``random_std_``.

    Raises:
        ValueError: A budget is outside [0, 1].

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y, g = rng.integers(0, 2, 500), rng.integers(0, 2, 500)
        >>> p = np.clip(y * 0.4 + 0.3 + rng.normal(0, 0.1 + 0.3 * g), 0, 1)
        >>> table = compare_override(y, p, g, budgets=[0.1], draws=20)
        >>> bool(table.loc[0.1, "accuracy_gap"] < table.loc[0.1, "random_accuracy_gap"])
        True
    """
    y, p = np.asarray(y_true), np.asarray(scores, dtype=float)
    if any(not 0 <= b <= 1 for b in budgets):
        raise ValueError(f"budgets are shares of rows in [0, 1], got {list(budgets)}")
    groups = read_groups(sensitive_features, rows=len(y))
    assert groups.codes is not None
    unsure = np.argsort(-susceptibility(p if dense_scores is None else dense_scores), kind="stable")
    rng, predicted, table = np.random.default_rng(random_state), (p >= 0.5).astype(int), {}
    for budget in (0.0, *budgets):
        k = round(budget * len(y))
        own = _after(y, predicted, groups, unsure[:k])
        chance = [_after(y, predicted, groups, rng.permutation(len(y))[:k]) for _ in range(draws)]
        row = dict(own)
        for name in own:
            values = np.array([c[name] for c in chance])
            row |= {f"random_{name}": float(np.nanmean(values)), f"random_std_{name}": float(np.nanstd(values))}
        table[budget] = row
    frame = pd.DataFrame.from_dict(table, orient="index")
    frame.index.name = "budget"
    return frame


def _after(y: NDArray[Any], predicted: NDArray[Any], groups: Groups, rows: NDArray[Any]) -> dict[str, float]:
    assert groups.codes is not None
    fixed = predicted.copy()
    fixed[rows] = y[rows]
    counts = confusion_counts(groups.codes, y, fixed, groups.size)
    total, found = counts.sum(axis=0), {}
    for metric in ("accuracy", "true_positive_rate"):
        value = rate(counts, metric)
        found[f"{metric}_gap"] = float(spread(value, rate(total, metric))["difference"])
    found["worst_group"] = float(np.nanmin(rate(counts, "accuracy")))
    amplified = [
        bias_amplification(np.stack([total - own, own]), min_positives=0, min_association=0).value for own in counts
    ]
    held = [abs(value) for value in amplified if not np.isnan(value)]
    found["amplification"] = max(held) if held else float("nan")
    return found
