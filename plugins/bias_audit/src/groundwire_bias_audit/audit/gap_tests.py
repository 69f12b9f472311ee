"""Tests of the gaps between groups that a gate judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.gate import GOOD_WHEN_HIGH, Gate, Test
from groundwire_bias_audit.audit.groups import as_tuple, unwrapped
from groundwire_bias_audit.audit.hypothesis_tests import adjust, homogeneity, welch
from groundwire_bias_audit.audit.rates import Counts, Floats, parts
from groundwire_bias_audit.audit.sample_weights import effective_counts, moments_of


@dataclass(frozen=True)
class GroupRates:
    """Counts of one possible :class:`Test`: successes and trials of each group (effective ones with weights)."""

    attribute: str
    metric: str
    target: str
    control: tuple[Any, ...]
    groups: tuple[Any, ...]
    successes: NDArray[Any]
    trials: NDArray[Any]


def rate_gap_tests(rates: Sequence[GroupRates], gate: Gate, seed: int = 0) -> list[Test]:
    """Test all gaps of an audit together, so that the correction counts them all."""
    draws = gate.permutations(len(rates))
    judged = [_enough(one, gate) for one in rates]
    p_values = [
        homogeneity(k, n, draws=draws, rng=np.random.default_rng([seed, i])) if len(n) > 1 else math.nan
        for i, (_, k, n) in enumerate(judged)
    ]
    adjusted = adjust(p_values, gate.correction)
    return [
        _test(one, counts, p, float(corrected), gate, draws, len(rates))
        for one, counts, p, corrected in zip(rates, judged, p_values, adjusted, strict=True)
    ]


_Judged = tuple[tuple[Any, ...], NDArray[np.int64], NDArray[np.int64]]


def _enough(one: GroupRates, gate: Gate) -> _Judged:
    """Groups with enough rows; effective counts are rounded down to whole rows."""
    enough = one.trials >= gate.min_count
    n = np.floor(one.trials[enough]).astype(np.int64)
    with np.errstate(invalid="ignore"):
        rates = one.successes[enough] / one.trials[enough]
    groups = tuple(group for group, good in zip(one.groups, enough, strict=True) if good)
    return groups, np.rint(rates * n).astype(np.int64), n


def _test(one: GroupRates, judged: _Judged, p: float, adjusted: float, gate: Gate, draws: int, tests: int) -> Test:
    groups, k, n = judged
    small = tuple(group for group in one.groups if group not in groups)
    rates = k / n
    gap = float(rates.max() - rates.min()) if len(n) > 1 else math.nan
    disparity = len(n) > 1 and gap > gate.tolerance and adjusted <= gate.alpha
    level = gate.alpha if gate.correction == "none" else gate.alpha / tests
    outliers = _outliers(one.metric, judged, gate.tolerance, level, draws) if disparity else ()
    return Test(
        one.attribute, one.metric, one.target, one.control,
        groups, small, gap, p, adjusted, disparity, outliers,
    )  # fmt: skip


def _outliers(metric: str, judged: _Judged, tolerance: float, level: float, draws: int) -> tuple[Any, ...]:
    """Leave out the most deviating group until the rest shows no disparity; of two groups the worse one is named.

    Naming a further group needs the strictest level of the correction, so that naming adds no false accusations.
    """
    found: list[Any] = []
    groups, k, n = judged
    sign = 1.0 if metric in GOOD_WHEN_HIGH else -1.0
    while len(n) > 1:
        rates = k / n
        if found and (rates.max() - rates.min() <= tolerance or homogeneity(k, n, draws=draws) > level):
            break
        rest = (k.sum() - k) / (n.sum() - n)
        pooled = k.sum() / n.sum()
        z = (rates - rest) / np.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / n + 1 / (n.sum() - n)))
        worst = int(np.argmin(sign * rates) if len(n) == 2 else np.argmax(np.abs(z)))
        found.append(groups[worst])
        keep = np.arange(len(n)) != worst
        groups, k, n = tuple(g for g, ok in zip(groups, keep, strict=True) if ok), k[keep], n[keep]
    return tuple(found)


def gap_tests(counts: GroupCounts, gate: Gate, random_state: int) -> list[Test]:
    """Every gated gap with its P value, corrected over all of them."""
    if counts.task == "regression":
        return _regression_tests(counts, gate)
    return rate_gap_tests(_all_rates(counts, gate), gate, random_state)


def _all_rates(counts: GroupCounts, gate: Gate) -> list[GroupRates]:
    assert gate.metrics is not None
    found = []
    for names in gate.attributes(counts.groups.sensitive):
        inside = counts.of(names)
        for metric in gate.metrics:
            found += _rates_of_metric(inside, gate, " x ".join(names), metric)
    return found


def _rates_of_metric(counts: GroupCounts, gate: Gate, attribute: str, metric: str) -> list[GroupRates]:
    confusion, squares, names = counts.confusion, counts.squared_weights, counts.names
    if counts.correct is not None:
        if metric != "accuracy" and not gate.named:
            return []  # by class, there would hardly ever be enough rows in every cell
        if metric == "accuracy":
            confusion, names = counts.correct, ("",)
            squares = None if squares is None else _all_right(squares)
    assert confusion is not None
    k, n = parts(confusion, metric)
    squared = None if squares is None else parts(squares, metric)
    return [
        replace(one, successes=successes, trials=trials)
        for t, name in enumerate(names)
        for one, cells in _control_blocks(counts, attribute, metric, str(name))
        for successes, trials in [
            (k[cells, t], n[cells, t])
            if squared is None
            else effective_counts(k[cells, t], n[cells, t], squared[0][cells, t], squared[1][cells, t])
        ]
    ]


def _regression_tests(counts: GroupCounts, gate: Gate) -> list[Test]:
    """Gaps of mean and mean absolute error in standard deviations of the label, by Welch's test from sums."""
    whole = counts.overall().moments
    assert whole is not None
    n, label, squared = (float(whole[:, i].sum()) for i in (0, 1, 5))
    scale = math.sqrt(max(squared / n - (label / n) ** 2, 0.0)) or 1.0
    raw = [
        test
        for names in gate.attributes(counts.groups.sensitive)
        for metric in ("mean_error", "mean_absolute_error")
        for test in _regression_gaps(counts.of(names), gate, " x ".join(names), metric, scale)
    ]
    adjusted = adjust([test.p_value for test in raw], gate.correction)
    return [
        replace(test, p_adjusted=float(p), disparity=bool(test.gap > gate.tolerance and p <= gate.alpha))
        for test, p in zip(raw, adjusted, strict=True)
    ]


def _regression_gaps(counts: GroupCounts, gate: Gate, attribute: str, metric: str, scale: float) -> list[Test]:
    assert counts.moments is not None
    absolute = metric == "mean_absolute_error"
    n, label, prediction, absolutes, squared, _ = counts.moments.T
    sums = np.stack([n, absolutes if absolute else prediction - label, squared])
    if counts.squared_weights is None:
        size, mean, variance = moments_of(*sums)
    else:
        size, mean, variance = moments_of(*sums, *counts.squared_weights[:, [0, 2 if absolute else 1, 3]].T)
    return [
        _welch(one, size[cells], mean[cells], variance[cells], scale, gate)
        for one, cells in _control_blocks(counts, attribute, metric, "")
    ]


def _welch(one: GroupRates, size: Floats, mean: Floats, variance: Floats, scale: float, gate: Gate) -> Test:
    enough = size >= gate.min_count
    groups, small = (
        tuple(g for g, ok in zip(one.groups, enough, strict=True) if bool(ok) is which) for which in (True, False)
    )
    n, mean, variance = size[enough], mean[enough], variance[enough]
    if len(n) < 2:
        return replace(_untested(one), groups=groups, small=small)
    # Few rows of a skewed error, or of one that is mostly 0, show too little of how much it varies.
    pooled = ((n - 1) * variance).sum() / (n - 1).sum()
    return replace(
        _untested(one), groups=groups, small=small, gap=float(np.ptp(mean)) / scale,
        p_value=welch(mean, np.maximum(variance, pooled), n),
    )  # fmt: skip


def _untested(one: GroupRates) -> Test:
    return Test(one.attribute, one.metric, one.target, one.control)


def _control_blocks(
    counts: GroupCounts, attribute: str, metric: str, target: str
) -> list[tuple[GroupRates, list[int]]]:
    """Group rates without counts, and the cells of each: one for each combination of control values that a row has."""
    groups, found, none = counts.groups, [], np.empty(0)
    labels = list(groups.index)
    blocks = math.prod(groups.shape[: groups.controls])
    width = groups.size // blocks
    for block in range(blocks):
        cells = [i for i in range(block * width, (block + 1) * width) if counts.size[i]]
        if cells:
            keys = [as_tuple(labels[i]) for i in cells]
            names = tuple(unwrapped(key[groups.controls :]) for key in keys)
            control = keys[0][: groups.controls]
            found.append((GroupRates(attribute, metric, target, control, names, none, none), cells))
    return found


def _all_right(squares: Counts) -> Counts:
    """Squared weights of all rows of each group, as the counts of "right" have them."""
    found = np.zeros((len(squares), 1, 2, 2))
    found[:, 0, 1, 1] = squares[:, 0].sum(axis=(1, 2))
    return found


def describe(test: Test) -> str:
    """A test as one sentence.

    Example:
        >>> describe(Test("sex", "accuracy", gap=0.2, p_adjusted=0.001, disparity=True, outliers=("f",)))
        'accuracy differs by 0.200 between groups of sex (adjusted P = 0.001); stands out: f'
    """
    where = f" of {test.target}" if test.target else ""
    within = f" within {', '.join(map(str, test.control))}" if test.control else ""
    worst = f"; stands out: {', '.join(map(str, test.outliers))}" if test.outliers else ""
    return (
        f"{test.metric}{where} differs by {test.gap:.3f} between groups of {test.attribute}{within} "
        f"(adjusted P = {test.p_adjusted:.2g}){worst}"
    )
