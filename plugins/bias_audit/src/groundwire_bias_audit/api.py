"""The audit of predictions in one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from groundwire_bias_audit.audit.change import Comparison, pair_counts
from groundwire_bias_audit.audit.counts import group_counts
from groundwire_bias_audit.audit.gate import Gate, checked_gate
from groundwire_bias_audit.audit.groups import Groups, read_groups
from groundwire_bias_audit.audit.predictions import Outputs, read_outputs
from groundwire_bias_audit.audit.tables import checked_metrics
from groundwire_bias_audit.result import AuditResult


def audit(
    y_true: Any,
    scores: Any = None,
    *,
    y_pred: Any = None,
    sensitive_features: Any,
    control_features: Any = None,
    sample_weight: Any = None,
    baseline_scores: Any = None,
    baseline_pred: Any = None,
    gate: Gate | None = None,
    metrics: Sequence[str] | None = None,
    task: str | None = None,
    threshold: float | Sequence[float] = 0.5,
    pos_label: Any = None,
    from_logits: bool = False,
    target_names: Sequence[str] | None = None,
    max_groups: int = 100,
    n_boot: int = 1000,
    ci_quantiles: Sequence[float] = (0.025, 0.975),
    random_state: int = 0,
) -> AuditResult:
    """Audit predictions by group, and what changed from a baseline model on the same rows.

    Argument names are fairlearn's. Numbers equal those of its ``MetricFrame``, except that a rate without denominator
    (a group with no positives) is NaN where fairlearn returns 0.

    Args:
        y_true: Labels: 0/1, -1/1 or bool (binary), several values (multiclass), shape (n, T) of 0/1 (multilabel), or
            real numbers (regression).
        scores: P(y=1) of shape (n,), class probabilities (n, C), or (n, T). Exactly one of scores and y_pred.
        y_pred: Hard predictions in the form of y_true (real ones for a regression); score metrics are then NaN.
        sensitive_features: One feature, or several as a DataFrame, mapping or (n, k) array. Missing values are a
            group of their own.
        control_features: Features within whose values groups are compared.
        sample_weight: Weight of each row, not negative. The comparison with a baseline counts rows without weights.
        baseline_scores: Scores of the model before compression, on the same rows.
        baseline_pred: Its hard predictions instead.
        gate: When a gap is a disparity; ``Gate()`` when left out.
        metrics: Columns to show; all when left out.
        task: "binary", "multiclass", "multilabel" or "regression"; guessed from the labels when left out.
        threshold: Predicted 1 where score >= threshold; one number, or one for each target of a multilabel task.
        pos_label: The positive label, where labels are neither 0/1 nor -1/1.
        from_logits: ``scores`` (and ``baseline_scores``) are logits.
        target_names: Names of the targets or classes.
        max_groups: Most values of a feature.
        n_boot: Bootstrap draws of the intervals.
        ci_quantiles: Of the intervals.
        random_state: Seed of bootstrap and permutations.

    Returns:
        The result; tables and verdict are computed when asked for.

    Raises:
        ValueError: The input cannot be used as it is; the text says what was found, where, and what to do.

    Example:
        >>> result = audit([1, 0, 1, 0], y_pred=[1, 0, 0, 0], sensitive_features=["f", "f", "m", "m"])
        >>> result.to_frame()["accuracy"].to_dict(), str(result.verdict)
        ({'f': 1.0, 'm': 0.5}, 'insufficient data')
    """
    options: dict[str, Any] = {
        "threshold": threshold, "pos_label": pos_label, "from_logits": from_logits, "names": target_names,
    }  # fmt: skip
    gate = checked_gate(gate)
    outputs = read_outputs(y_true, scores, y_pred, task=task, **options)
    groups = read_groups(sensitive_features, control_features, rows=outputs.rows, max_groups=max_groups)
    weights = None if sample_weight is None else _weights(sample_weight, outputs.rows)
    intervals: dict[str, Any] = {
        "n_boot": _at_least(n_boot, 1, "n_boot"), "ci_quantiles": _quantiles(ci_quantiles),
        "random_state": random_state,
    }  # fmt: skip
    comparison = None
    if baseline_scores is not None or baseline_pred is not None:
        if weights is not None:
            warnings.warn("the comparison with the baseline counts rows, without sample_weight", stacklevel=2)
        before = read_outputs(y_true, baseline_scores, baseline_pred, task=outputs.task, **options)
        comparison = compare(before, outputs, groups, gate, **intervals)
    shown = checked_metrics(metrics)
    return AuditResult(group_counts(outputs, groups, weights), gate, comparison, shown, **intervals)


def compare(before: Outputs, after: Outputs, groups: Groups, gate: Gate, **intervals: Any) -> Comparison:
    """Compare ``before`` and ``after``.

    Raises:
        ValueError: They differ in rows, labels or classes, or the task is a regression.
    """
    if after.task == "regression":
        raise ValueError(
            "a baseline is compared by flips of predictions, which a regression has not -> audit each model"
        )
    if after.task == "multiclass" and before.names != after.names:  # one of them never predicts some class
        names = tuple(dict.fromkeys((*after.names, *before.names)))
        before, after = before.with_classes(names), after.with_classes(names)
    if before.names != after.names or before.labels.shape != after.labels.shape:
        raise ValueError(f"the baseline has the targets {before.names} and the model {after.names}")
    assert groups.codes is not None
    pairs, flips = pair_counts(groups.codes, before, after, groups.size)
    names = ("",) if after.task == "multiclass" else after.names
    return Comparison(groups, names, pairs, flips, gate, **intervals)


def _weights(values: Any, rows: int) -> Any:
    weights = np.asarray(values, dtype=np.float64)
    if weights.shape != (rows,):
        raise ValueError(f"sample_weight must have shape ({rows},), got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError("sample_weight must be finite, not negative, and not all 0")
    return weights


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    found = tuple(values)
    if not found or any(not 0 <= q <= 1 for q in found) or list(found) != sorted(found):
        raise ValueError(f"ci_quantiles must be ascending numbers in [0, 1], got {values!r}")
    return found


def _at_least(value: int, least: int, name: str) -> int:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
