"""Tables of an audit: metrics by group, their intervals, impact ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.bootstrap import bootstrap, bootstrap_rows, bootstrap_scores
from groundwire_bias_audit.evidence import Evidence, regression_table
from groundwire_bias_audit.functional import RATES, Counts, Floats, rate
from groundwire_bias_audit.gate import check_metric
from groundwire_bias_audit.grouping import as_tuple

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


def metrics_by_group(evidence: Evidence, target: int, one: bool, shown: Sequence[str]) -> pd.DataFrame:
    """``count`` and the metrics ``shown``; of one target or class, or of the task as a whole."""
    values: dict[str, Any] = {"count": evidence.size}
    if evidence.moments is not None:
        values |= regression_table(evidence.moments)
    elif evidence.hits is not None and not one:
        values["accuracy"] = rate(evidence.hits[:, 0], "accuracy")
    elif evidence.counts is not None:
        values |= {name: rate(evidence.counts[:, target], name) for name in RATES}
    if set(shown) & set(SCORE_METRICS):
        undefined = np.full((evidence.groups.size, len(evidence.names)), np.nan)
        table = evidence.score_table
        axis = 0 if evidence.task == "multiclass" else target
        values |= {name: table.get(name, undefined)[:, axis] for name in SCORE_METRICS}
    return pd.DataFrame({name: values[name] for name in ("count", *shown)}, index=evidence.groups.index)


def intervals_by_group(
    evidence: Evidence, target: int, one: bool, shown: Sequence[str], **options: Any
) -> pd.DataFrame:
    """Bootstrap intervals of the metrics ``shown``; ``options`` are ``n_boot``, ``ci_quantiles``, ``random_state``."""
    found: dict[str, Floats] = {}
    if evidence.counts is not None:
        found |= _of_rates(evidence, evidence.counts, target, one, shown, options)
    histogram = None if evidence.task == "multiclass" and one else evidence.score_histogram
    if histogram is not None and evidence.squares is None and {"roc_auc", "uncertainty"} & set(shown):
        axis = target if evidence.task == "multilabel" else 0
        own = replace(histogram, counts=histogram.counts[:, axis : axis + 1])
        scores = bootstrap_scores(own, **options | {"n_boot": min(options["n_boot"], 200)})
        found |= {name: value[:, :, 0] for name, value in scores.items()}
    q = list(options["ci_quantiles"])
    held = [name for name in shown if name in found]
    values = [found[name][i] for name in held for i in range(len(q))]
    data = np.stack(values, axis=1) if values else np.empty((evidence.groups.size, 0))
    columns = pd.MultiIndex.from_product([held, q], names=["metric", "quantile"])
    return pd.DataFrame(data, index=evidence.groups.index, columns=columns)


def _of_rates(
    evidence: Evidence, by_target: Counts, target: int, one: bool, shown: Sequence[str], options: dict[str, Any]
) -> dict[str, Floats]:
    single = evidence.hits is not None and not one
    counts = evidence.hits if evidence.hits is not None and not one else by_target
    names = ("accuracy",) if single else tuple(name for name in RATES if name in shown)
    if evidence.squares is None:
        found = bootstrap(counts[:, min(target, counts.shape[1] - 1)], names, **options)
        return {name: aggregates["by_group"] for name, aggregates in found.items()}
    if evidence.rows is None or evidence.rows.weights is None or evidence.groups.codes is None:
        return {}
    labels, predictions = evidence.rows.outputs.targets
    label, prediction = labels[:, target], predictions[:, target]
    if single:
        label, prediction = np.ones_like(label), evidence.rows.outputs.correct
    cells = evidence.groups.codes.astype(np.int64) * 4 + label * 2 + prediction
    return bootstrap_rows(cells, evidence.rows.weights, evidence.groups.size, names, **options)


def confusion_by_confidence(evidence: Evidence, target: int) -> pd.DataFrame:
    """TP, FN, FP and TN of one target by group, split into certain and uncertain.

    Raises:
        ValueError: There are no scores, or the task is neither binary nor multilabel.
    """
    counts = evidence.confident()
    if counts is None:
        raise ValueError("confidence needs scores of a binary or multilabel task")
    columns = {
        (name, kind): counts[:, target, y, p, certain]
        for name, y, p in (("TP", 1, 1), ("TN", 0, 0), ("FP", 0, 1), ("FN", 1, 0))
        for kind, certain in (("certain", 1), ("uncertain", 0))
    }
    return pd.DataFrame(columns, index=evidence.groups.index)


def impact(frame: pd.DataFrame, within: Sequence[int]) -> pd.DataFrame:
    """Selection rates over the highest one among the rows that agree in the index levels ``within``.

    Raises:
        ValueError: ``frame`` has no selection rate.
    """
    if "selection_rate" not in frame:
        raise ValueError("there is no selection rate -> of a multiclass task name a class as target")
    rates = frame["selection_rate"]
    best = rates.groupby(level=list(within)).transform("max") if within else rates.max()
    values = rates / best  # NaN where nobody is selected
    four_fifths = (values >= 0.8).astype(object).where(values.notna(), None)
    return frame[["count", "selection_rate"]].assign(impact_ratio=values, four_fifths=four_fifths)


def by_target(frames: Mapping[Any, pd.DataFrame]) -> pd.DataFrame:
    """Tables of several targets as one; the target is the last level of the index.

    Example:
        >>> table = pd.DataFrame({"count": [2, 3]}, index=pd.Index(["f", "m"], name="sex"))
        >>> by_target({"hat": table, "beard": table}).index.tolist()
        [('f', 'hat'), ('f', 'beard'), ('m', 'hat'), ('m', 'beard')]
    """
    first = next(iter(frames.values())).index
    level = "target" if "target" not in first.names else "target of the model"
    joined = pd.concat(frames, names=[level, *first.names])
    order = [(*as_tuple(label), target) for label in first for target in frames]
    return joined.reorder_levels([*range(1, joined.index.nlevels), 0]).reindex(order)
