"""Tables of an audit: metrics by group, their intervals, impact ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.gate import check_metric
from groundwire_bias_audit.audit.intervals import bootstrap, bootstrap_rows, bootstrap_scores
from groundwire_bias_audit.audit.rates import RATES, Counts, Floats, parts, rate, ratio, regression_table

SCORE_METRICS = ("roc_auc", "calibration_error", "uncertainty")
REGRESSION_METRICS = (
    "mean_label",
    "mean_prediction",
    "mean_error",
    "mean_absolute_error",
    "mean_squared_error",
    "r2_score",
)
METRICS = (*RATES, *SCORE_METRICS, *REGRESSION_METRICS)


def checked_metrics(metrics: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """``metrics`` if all are known.

    Raises:
        ValueError: One is not; the nearest is shown.
    """
    if metrics is None:
        return None
    return tuple(check_metric(name, METRICS) for name in ([metrics] if isinstance(metrics, str) else metrics))


def columns_of(task: str, one: bool, asked: Sequence[str] | None) -> list[str]:
    """Metrics of a task; ``one`` for a single target or class.

    Example:
        >>> columns_of("multiclass", False, None)
        ['accuracy', 'calibration_error', 'uncertainty']
    """
    if task == "regression":
        known: Sequence[str] = REGRESSION_METRICS
    elif task == "multiclass":
        known = tuple(RATES) if one else ("accuracy", *SCORE_METRICS[1:])
    else:
        known = (*RATES, *SCORE_METRICS)
    return [name for name in known if asked is None or name in asked]


def metrics_by_group(counts: GroupCounts, target: int, one: bool, shown: Sequence[str]) -> pd.DataFrame:
    """``count`` and the metrics ``shown``; of one target or class, or of the task as a whole."""
    values: dict[str, Any] = {"count": counts.size}
    if counts.moments is not None:
        values |= regression_table(counts.moments)
    elif counts.correct is not None and not one:
        values["accuracy"] = rate(counts.correct[:, 0], "accuracy")
    elif counts.confusion is not None:
        values |= {name: rate(counts.confusion[:, target], name) for name in RATES}
    if set(shown) & set(SCORE_METRICS):
        undefined = np.full((counts.groups.size, len(counts.names)), np.nan)
        table = counts.score_table
        axis = 0 if counts.task == "multiclass" else target
        values |= {name: table.get(name, undefined)[:, axis] for name in SCORE_METRICS}
    return pd.DataFrame({name: values[name] for name in ("count", *shown)}, index=counts.groups.index)


def intervals_by_group(
    counts: GroupCounts, target: int, one: bool, shown: Sequence[str], **options: Any
) -> pd.DataFrame:
    """Bootstrap intervals of the metrics ``shown``; ``options`` are ``n_boot``, ``ci_quantiles``, ``random_state``."""
    found: dict[str, Floats] = {}
    if counts.confusion is not None:
        found |= _rate_intervals(counts, counts.confusion, target, one, shown, options)
    histogram = None if counts.task == "multiclass" and one else counts.score_histogram
    if histogram is not None and counts.squared_weights is None and {"roc_auc", "uncertainty"} & set(shown):
        axis = target if counts.task == "multilabel" else 0
        own = replace(histogram, counts=histogram.counts[:, axis : axis + 1])
        scores = bootstrap_scores(own, **options | {"n_boot": min(options["n_boot"], 200)})
        found |= {name: value[:, :, 0] for name, value in scores.items()}
    q = list(options["ci_quantiles"])
    held = [name for name in shown if name in found]
    values = [found[name][i] for name in held for i in range(len(q))]
    data = np.stack(values, axis=1) if values else np.empty((counts.groups.size, 0))
    columns = pd.MultiIndex.from_product([held, q], names=["metric", "quantile"])
    return pd.DataFrame(data, index=counts.groups.index, columns=columns)


def _rate_intervals(
    counts: GroupCounts, by_target: Counts, target: int, one: bool, shown: Sequence[str], options: dict[str, Any]
) -> dict[str, Floats]:
    single = counts.correct is not None and not one
    confusion = counts.correct if counts.correct is not None and not one else by_target
    names = ("accuracy",) if single else tuple(name for name in RATES if name in shown)
    if counts.squared_weights is None:
        found = bootstrap(confusion[:, min(target, confusion.shape[1] - 1)], names, **options)
        return {name: aggregates["by_group"] for name, aggregates in found.items()}
    if counts.rows is None or counts.rows.weights is None or counts.groups.codes is None:
        return {}
    labels, predictions = counts.rows.outputs.targets
    label, prediction = labels[:, target], predictions[:, target]
    if single:
        label, prediction = np.ones_like(label), counts.rows.outputs.correct
    cells = counts.groups.codes.astype(np.int64) * 4 + label * 2 + prediction
    return bootstrap_rows(cells, counts.rows.weights, counts.groups.size, names, **options)


def confusion_by_confidence(counts: GroupCounts, target: int) -> pd.DataFrame:
    """TP, FN, FP and TN of one target by group, split into certain and uncertain.

    Raises:
        ValueError: There are no scores, or the task is neither binary nor multilabel.
    """
    confusion = counts.confident()
    if confusion is None:
        raise ValueError("confidence needs scores of a binary or multilabel task")
    columns = {
        (name, kind): confusion[:, target, y, p, certain]
        for name, y, p in (("TP", 1, 1), ("TN", 0, 0), ("FP", 0, 1), ("FN", 1, 0))
        for kind, certain in (("certain", 1), ("uncertain", 0))
    }
    return pd.DataFrame(columns, index=counts.groups.index)


def impact_ratios(counts: GroupCounts, target: int, min_count: int) -> pd.DataFrame:
    """Selection rates of one target over the highest one within the same control values, and the four-fifths rule.

    The rule compares counts and not rounded quotients: k_i / n_i is four fifths of k_b / n_b if 5 k_i n_b >= 4 k_b n_i;
    with weights, up to a relative slack of 1e-9. A group with fewer than ``min_count`` rows is marked, never sets the
    highest rate, and is judged no more than it judges others; unless all groups have so few.

    Raises:
        ValueError: The task has no selection rate.
    """
    if counts.confusion is None:
        raise ValueError("there is no selection rate -> of a multiclass task name a class as target")
    k, n = parts(counts.confusion[:, target], "selection_rate")
    few = counts.size < min_count
    ratios, judged = np.full(len(n), np.nan), np.full(len(n), None, dtype=object)
    width = len(n) // math.prod(counts.groups.shape[: counts.groups.controls])
    for start in range(0, len(n), width):
        block = [i for i in range(start, start + width) if n[i] > 0]
        able = [i for i in block if not few[i]] or block
        best = max(able, key=lambda i: Fraction(k[i].item()) / Fraction(n[i].item()), default=None)
        if best is None or not k[best]:
            continue  # nobody is selected
        ratios[block] = (k[block] / n[block]) / (k[best] / n[best])
        slack = 1 if counts.squared_weights is None else 1 + 1e-9
        for i in able:
            judged[i] = bool(5 * k[i].item() * n[best].item() * slack >= 4 * k[best].item() * n[i].item())
    columns = {"count": counts.size, "selection_rate": ratio(k, n), "impact_ratio": ratios, "four_fifths": judged,
               "too_few_rows": few}  # fmt: skip
    return pd.DataFrame(columns, index=counts.groups.index)
