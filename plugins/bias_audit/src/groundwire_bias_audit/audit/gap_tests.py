"""Tests of the gaps between groups that a gate judges: every pair of groups, all at one level together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.gate import GOOD_WHEN_HIGH, Gate, Test
from groundwire_bias_audit.audit.groups import as_tuple, unwrapped
from groundwire_bias_audit.audit.hypothesis_tests import adjust
from groundwire_bias_audit.audit.rate_differences import (
    clopper_pearson,
    difference_p_value,
    difference_z,
    gap_at_least,
    gap_at_most,
)
from groundwire_bias_audit.audit.rates import Counts, Floats, parts
from groundwire_bias_audit.audit.sample_weights import effective_counts, moments_of

#: Share of the rows that the judged groups must hold for a pass.
COVERED = 0.9


@dataclass(frozen=True)
class GroupValues:
    """Rates of the groups of one possible :class:`Test`, or means of a regression.

    Attributes:
        attribute: As in the test; so are ``metric``, ``target`` and ``control``.
        groups: Those that have a row.
        rows: In the denominator of each group, effective ones with weights.
        values: Rate or mean of each group, NaN without rows.
        variances: Of the rows of each group, for means; None for rates.
    """

    attribute: str
    metric: str
    target: str
    control: tuple[Any, ...]
    groups: tuple[Any, ...]
    rows: Floats
    values: Floats
    variances: Floats | None = None

    def judged(self, gate: Gate) -> GroupValues:
        """Those with enough rows; effective rows are rounded down to whole ones."""
        enough = self.rows >= gate.min_count
        groups = tuple(group for group, good in zip(self.groups, enough, strict=True) if good)
        rows, variances = self.rows[enough], None if self.variances is None else self.variances[enough]
        if variances is None:
            rows = np.floor(rows)
        elif len(groups) > 1:
            # Few rows of a skewed error, or of one that is mostly 0, show too little of how much it varies.
            pooled = ((rows - 1) * variances).sum() / (rows - 1).sum()
            variances = np.maximum(variances, pooled)
        return replace(self, groups=groups, rows=rows, values=self.values[enough], variances=variances)


def gap_tests(counts: GroupCounts, gate: Gate) -> list[Test]:
    """Test every gated gap of an audit, at one level over all pairs of groups together."""
    found = list(_regression_values(counts, gate) if counts.task == "regression" else _rate_values(counts, gate))
    judged = [values.judged(gate) for values in found]
    pairs = [_pairs(values) for values in judged]
    level = gate.alpha / max(1, sum(len(high) for high, _ in pairs))
    p_values = _p_values(judged, pairs, gate)
    bounds = np.cumsum([0, *(len(high) for high, _ in pairs)])
    adjusted = adjust(p_values, gate.correction)
    tests = [
        _test(values, own, pair, p_values[start:end], adjusted[start:end], gate, level)
        for values, own, pair, start, end in zip(found, judged, pairs, bounds[:-1], bounds[1:], strict=True)
    ]
    constant = _constant_columns(counts)
    return with_obstacles(tests, [values.rows for values in found], constant, gate)


_Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]


def _pairs(values: GroupValues) -> _Pairs:
    """All pairs of groups, the one with the larger value first."""
    i, j = np.triu_indices(len(values.groups), 1)
    swap = values.values[i] < values.values[j]
    return np.where(swap, j, i), np.where(swap, i, j)


def _p_values(judged: Sequence[GroupValues], pairs: Sequence[_Pairs], gate: Gate) -> Floats:
    """P value of "the difference is within the tolerance" of all pairs of all tests."""
    rough = np.concatenate(
        [
            np.empty(0),
            *(_approximate(values, *pair, gate.tolerance) for values, pair in zip(judged, pairs, strict=True)),
        ]
    )
    where = [(values, i, j) for values, pair in zip(judged, pairs, strict=True) for i, j in zip(*pair, strict=True)]
    sure = np.concatenate([np.empty(0, bool), *(
        _beyond_doubt(values, *pair, gate.tolerance, gate.alpha / max(1, len(rough)))
        for values, pair in zip(judged, pairs, strict=True)
    )])  # fmt: skip
    found, last = np.where(sure, np.minimum(rough, gate.alpha / max(1, len(rough))), rough), 0.0
    order = np.argsort(found, kind="stable")
    for rank, position in enumerate(order):
        # Below the level of its step a P value is computed exactly; Holm's steps end at the first that fails.
        limit = gate.alpha / (len(order) - rank) if gate.correction == "holm" else gate.alpha
        if found[position] > 1.5 * limit or last > limit:
            found[order[rank:]] = np.maximum(found[order[rank:]], last)
            break
        values, i, j = where[position]
        if values.variances is None and not sure[position]:
            found[position] = last = _exact(values, i, j, gate.tolerance, gate.alpha / len(order))
    return found


def _approximate(values: GroupValues, high: NDArray[np.intp], low: NDArray[np.intp], tolerance: float) -> Floats:
    """Two-sided P values by the score statistic, or for means by Welch's t."""
    if not len(high):
        return np.empty(0)
    difference = values.values[high] - values.values[low]
    if values.variances is None:
        k = np.rint(values.values * values.rows)
        z = difference_z(k[high], values.rows[high], k[low], values.rows[low], tolerance)
        far = z + 2 * tolerance / _deviation(k, values.rows, high, low)
        return np.asarray(norm.sf(z) + norm.sf(far))
    error, freedom = _welch(values, high, low)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = [np.where(error > 0, (difference + s * tolerance) / error, np.inf * (difference > tolerance))
                for s in (-1, 1)]  # fmt: skip
    return np.where(
        (error == 0) & (difference <= tolerance), 1.0, student.sf(ends[0], freedom) + student.sf(ends[1], freedom)
    )


def _beyond_doubt(
    values: GroupValues, high: NDArray[np.intp], low: NDArray[np.intp], tolerance: float, level: float
) -> NDArray[np.bool_]:
    """Pairs of rates whose P value is at most ``level``, since the exact intervals of the two are so far apart."""
    if values.variances is not None or not len(high):
        return np.zeros(len(high), bool)
    k, n = np.rint(values.values * values.rows).astype(np.int64), values.rows.astype(np.int64)
    # Two tails for one direction of the difference, and two for the other.
    ends = np.array([clopper_pearson(*counts, level / 4) for counts in zip(k.tolist(), n.tolist(), strict=True)])
    return np.asarray(ends[high, 0] - ends[low, 1] > tolerance)


def _deviation(k: NDArray[Any], n: NDArray[Any], i: Any, j: Any) -> Floats:
    """Standard deviation of the difference of two rates, never 0."""
    p = (k + 0.5) / (n + 1)
    found: Floats = np.sqrt(p[i] * (1 - p[i]) / n[i] + p[j] * (1 - p[j]) / n[j])
    return found


def _exact(values: GroupValues, i: int, j: int, tolerance: float, level: float) -> float:
    """Exact P value in one direction, plus that in the other one, by twice the normal ratio of the two."""
    k, n = np.rint(values.values * values.rows).astype(np.int64), values.rows.astype(np.int64)
    z = float(difference_z(k[i], n[i], k[j], n[j], tolerance))
    far = z + 2 * tolerance / float(_deviation(k, n, i, j))
    other = min(1.0, 2 * math.exp(norm.logsf(far) - norm.logsf(z)))
    p = difference_p_value(int(k[i]), int(n[i]), int(k[j]), int(n[j]), tolerance, level)
    return min(1.0, p * (1 + other))


def _welch(values: GroupValues, i: Any, j: Any) -> tuple[Floats, Floats]:
    """Standard error of differences of means, and Welch's degrees of freedom."""
    assert values.variances is not None
    a, b = (values.variances[x] / values.rows[x] for x in (i, j))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (a + b) ** 2 / (a**2 / (values.rows[i] - 1) + b**2 / (values.rows[j] - 1))
    return np.sqrt(a + b), np.where(np.isfinite(freedom), freedom, 1.0)


def _limit(values: GroupValues, level: float, end: int) -> float:
    """Lower (``end`` -1) or upper (1) limit of the largest difference, simultaneous over pairs at ``level`` each."""
    if values.variances is None:
        k, n = np.rint(values.values * values.rows).astype(np.int64), values.rows.astype(np.int64)
        return gap_at_most(k, n, level) if end > 0 else gap_at_least(k, n, level)
    high, low = _pairs(values)
    error, freedom = _welch(values, high, low)
    reach = student.isf(level / 2, freedom) * error
    return max(0.0, float((values.values[high] - values.values[low] + end * reach).max()))


def _test(
    values: GroupValues, own: GroupValues, pairs: _Pairs, p: Floats, adjusted: Floats, gate: Gate, level: float
) -> Test:
    small = tuple(group for group in values.groups if group not in own.groups)
    head = Test(values.attribute, values.metric, values.target, values.control, own.groups, small,
                rates=tuple(own.values.tolist()), rows=tuple(own.rows.tolist()))  # fmt: skip
    if not len(p):
        return head
    beyond = adjusted <= gate.alpha
    gap = float(np.ptp(own.values))
    return replace(
        head, gap=gap, p_value=float(p.min()), p_adjusted=float(adjusted.min()), disparity=bool(beyond.any()),
        outliers=_outliers(own, pairs[0][beyond], pairs[1][beyond]),
        limits=(partial(_limit, own, level, -1), partial(_limit, own, level, 1)),
    )  # fmt: skip


def _outliers(values: GroupValues, high: NDArray[np.intp], low: NDArray[np.intp]) -> tuple[Any, ...]:
    """Leave out the group of the most differing pairs until none is left; of two groups the worse one is named."""
    found = []
    badness = -values.values if values.metric in GOOD_WHEN_HIGH else np.abs(values.values)
    while len(high):
        counts = np.bincount(np.concatenate([high, low]), minlength=len(values.groups))
        most = np.flatnonzero(counts == counts.max())
        worst = int(most[np.argmax(badness[most])])
        found.append(values.groups[worst])
        rest = (high != worst) & (low != worst)
        high, low = high[rest], low[rest]
    return tuple(found)


def with_obstacles(tests: Sequence[Test], rows: Sequence[Floats], constant: dict[str, str], gate: Gate) -> list[Test]:
    """The tests with the reasons for which they let no audit pass.

    Args:
        tests: Those of one attribute, metric and target follow each other, one for each control value.
        rows: Of the denominators of all groups of each test.
        constant: By target: what is the same in all rows, so that there is nothing to compare.
        gate: Of the audit.
    """
    found = []
    for key, several in groupby(zip(tests, rows, strict=True), lambda pair: _of_one(pair[0])):
        own = list(several)
        reason = constant.get(key[2], "") or _obstacle([test for test, _ in own], [n for _, n in own], gate)
        found += [replace(test, insufficient=reason) for test, _ in own]
    return found


def _of_one(test: Test) -> tuple[str, str, str]:
    return test.attribute, test.metric, test.target


def _obstacle(tests: Sequence[Test], rows: Sequence[Floats], gate: Gate) -> str:
    total = sum(float(n.sum()) for n in rows)
    judged = sum(
        float(n[n >= gate.min_count].sum()) for test, n in zip(tests, rows, strict=True) if len(test.groups) > 1
    )
    name = replace(tests[0], control=()).name
    if total == 0:
        return f"{name} is undefined, since no row is in its denominator"
    if max(len(n) for n in rows) < 2:
        return f"there is only one group of {tests[0].attribute} to compare"
    if judged == 0:
        return f"fewer than two groups have {gate.min_count} rows for {name}"
    if judged < COVERED * total:
        return (f"the groups of at least {gate.min_count} rows hold {judged / total:.1%} of the rows for {name}, "
                f"of which {COVERED:.0%} are needed")  # fmt: skip
    return ""


def _constant_columns(counts: GroupCounts) -> dict[str, str]:
    """By target: labels or predictions that are the same in all rows. Nothing can be compared then."""
    if counts.moments is not None:
        n, label, prediction, _, squared, label_squared = counts.moments.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            # Of a constant c the squared errors sum to n c^2 - 2 c sum y + sum y^2.
            alone = n * (prediction / n) ** 2 - 2 * prediction / n * label + label_squared
            same = {"labels": label_squared - label**2 / n, "predictions": squared - alone}
        constant = [what for what, spread in same.items() if abs(spread) <= 1e-9 * label_squared]
        return {"": f"all {' and '.join(constant)} are the same"} if constant else {}
    assert counts.confusion is not None
    total = counts.confusion.sum(axis=0)
    found: dict[str, str] = {}
    if counts.correct is not None:
        for what, sums in (("labels", total[:, 1].sum(axis=-1)), ("predictions", total[:, :, 1].sum(axis=-1))):
            if np.count_nonzero(sums) < 2:
                found = dict.fromkeys(["", *map(str, counts.names)], f"all {what} are the same")
        return found
    for name, cells in zip(map(str, counts.names), total, strict=True):
        for what, sums in (("labels", cells.sum(axis=1)), ("predictions", cells.sum(axis=0))):
            if np.count_nonzero(sums) < 2:
                found[name] = f"all {what}{f' of {name}' if name else ''} are the same"
    return found


def _rate_values(counts: GroupCounts, gate: Gate) -> Iterator[GroupValues]:
    assert gate.metrics is not None
    for names in gate.attributes(counts.groups.sensitive):
        for metric in gate.metrics:
            yield from _values_of_metric(counts.of(names), gate, " x ".join(names), metric)


def _values_of_metric(counts: GroupCounts, gate: Gate, attribute: str, metric: str) -> Iterator[GroupValues]:
    confusion, squares, names = counts.confusion, counts.squared_weights, counts.names
    if counts.correct is not None:
        if metric != "accuracy" and not gate.named:
            return  # by class, there would hardly ever be enough rows in every cell
        if metric == "accuracy":
            confusion, names = counts.correct, ("",)
            squares = None if squares is None else _all_right(squares)
    assert confusion is not None
    k, n = parts(confusion, metric)
    squared = None if squares is None else parts(squares, metric)
    for t, name in enumerate(names):
        for control, groups, cells in _control_blocks(counts):
            successes, trials = k[cells, t], n[cells, t]
            if squared is not None:
                successes, trials = effective_counts(successes, trials, squared[0][cells, t], squared[1][cells, t])
            with np.errstate(divide="ignore", invalid="ignore"):
                rates = np.true_divide(successes, trials)
            yield GroupValues(attribute, metric, str(name), control, groups, trials.astype(float), rates)


def _regression_values(counts: GroupCounts, gate: Gate) -> Iterator[GroupValues]:
    """Mean error and mean absolute error by group, in standard deviations of the label."""
    whole = counts.overall().moments
    assert whole is not None
    n, label, squared = (float(whole[:, i].sum()) for i in (0, 1, 5))
    scale = math.sqrt(max(squared / n - (label / n) ** 2, 0.0)) or 1.0
    for names in gate.attributes(counts.groups.sensitive):
        inside = counts.of(names)
        for metric in ("mean_error", "mean_absolute_error"):
            size, mean, variance = _error_moments(inside, metric)
            for control, groups, cells in _control_blocks(inside):
                yield GroupValues(
                    " x ".join(names), metric, "", control, groups,
                    size[cells], mean[cells] / scale, variance[cells] / scale**2,
                )  # fmt: skip


def _error_moments(counts: GroupCounts, metric: str) -> tuple[Floats, Floats, Floats]:
    assert counts.moments is not None
    absolute = metric == "mean_absolute_error"
    n, label, prediction, absolutes, squared, _ = counts.moments.T
    sums = np.stack([n, absolutes if absolute else prediction - label, squared])
    if counts.squared_weights is None:
        return moments_of(*sums)
    return moments_of(*sums, *counts.squared_weights[:, [0, 2 if absolute else 1, 3]].T)


def _control_blocks(counts: GroupCounts) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], list[int]]]:
    """Control values, groups and cells of each combination of control values that a row has."""
    groups = counts.groups
    labels = list(groups.index)
    width = groups.size // math.prod(groups.shape[: groups.controls])
    for start in range(0, groups.size, width):
        cells = [i for i in range(start, start + width) if counts.size[i]]
        if cells:
            keys = [as_tuple(labels[i]) for i in cells]
            yield keys[0][: groups.controls], tuple(unwrapped(key[groups.controls :]) for key in keys), cells


def _all_right(squares: Counts) -> Counts:
    """Squared weights of all rows of each group, as the counts of "right" have them."""
    found = np.zeros((len(squares), 1, 2, 2))
    found[:, 0, 1, 1] = squares[:, 0].sum(axis=(1, 2))
    return found
