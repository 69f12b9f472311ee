"""The questions that a gate asks of an audit's sums, and their answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from groundwire_bias_audit.evidence import Evidence
from groundwire_bias_audit.functional import Counts, Floats, parts
from groundwire_bias_audit.gate import Gate
from groundwire_bias_audit.grouping import as_tuple, unwrapped
from groundwire_bias_audit.judging import Question, Test, ask
from groundwire_bias_audit.null import adjust, welch
from groundwire_bias_audit.weighting import effective, moments_of


def tests_of(evidence: Evidence, gate: Gate, random_state: int) -> list[Test]:
    """Every gated gap with its P value, corrected over all of them."""
    if evidence.task == "regression":
        return _regression_tests(evidence, gate)
    return ask(_questions(evidence, gate), gate, random_state)


def _questions(evidence: Evidence, gate: Gate) -> list[Question]:
    assert gate.metrics is not None
    found = []
    for names in gate.attributes(evidence.groups.sensitive):
        inside = evidence.of(names)
        for metric in gate.metrics:
            found += _of_metric(inside, gate, " x ".join(names), metric)
    return found


def _of_metric(evidence: Evidence, gate: Gate, attribute: str, metric: str) -> list[Question]:
    counts, squares, names = evidence.counts, evidence.squares, evidence.names
    if evidence.hits is not None:
        if metric != "accuracy" and not gate.named:
            return []  # by class, there would hardly ever be enough rows in every cell
        if metric == "accuracy":
            counts, names = evidence.hits, ("",)
            squares = None if squares is None else _all_right(squares)
    assert counts is not None
    k, n = parts(counts, metric)
    squared = None if squares is None else parts(squares, metric)
    return [
        replace(question, successes=successes, trials=trials)
        for t, name in enumerate(names)
        for question, cells in _blocks(evidence, attribute, metric, str(name))
        for successes, trials in [
            (k[cells, t], n[cells, t])
            if squared is None
            else effective(k[cells, t], n[cells, t], squared[0][cells, t], squared[1][cells, t])
        ]
    ]


def _regression_tests(evidence: Evidence, gate: Gate) -> list[Test]:
    """Gaps of mean and mean absolute error in standard deviations of the label, by Welch's test from sums."""
    whole = evidence.overall().moments
    assert whole is not None
    n, label, squared = (float(whole[:, i].sum()) for i in (0, 1, 5))
    scale = math.sqrt(max(squared / n - (label / n) ** 2, 0.0)) or 1.0
    raw = [
        test
        for names in gate.attributes(evidence.groups.sensitive)
        for metric in ("mean_error", "mean_absolute_error")
        for test in _regression_questions(evidence.of(names), gate, " x ".join(names), metric, scale)
    ]
    adjusted = adjust([test.p_value for test in raw], gate.correction)
    return [
        replace(test, p_adjusted=float(p), disparity=bool(test.gap > gate.tolerance and p <= gate.alpha))
        for test, p in zip(raw, adjusted, strict=True)
    ]


def _regression_questions(evidence: Evidence, gate: Gate, attribute: str, metric: str, scale: float) -> list[Test]:
    assert evidence.moments is not None
    absolute = metric == "mean_absolute_error"
    n, label, prediction, absolutes, squared, _ = evidence.moments.T
    sums = np.stack([n, absolutes if absolute else prediction - label, squared])
    if evidence.squares is None:
        size, mean, variance = moments_of(*sums)
    else:
        size, mean, variance = moments_of(*sums, *evidence.squares[:, [0, 2 if absolute else 1, 3]].T)
    return [
        _welch(question, size[cells], mean[cells], variance[cells], scale, gate)
        for question, cells in _blocks(evidence, attribute, metric, "")
    ]


def _welch(question: Question, size: Floats, mean: Floats, variance: Floats, scale: float, gate: Gate) -> Test:
    enough = size >= gate.min_count
    groups, small = (
        tuple(g for g, ok in zip(question.groups, enough, strict=True) if bool(ok) is which) for which in (True, False)
    )
    n, mean, variance = size[enough], mean[enough], variance[enough]
    if len(n) < 2:
        return replace(_untested(question), groups=groups, small=small)
    # Few rows of a skewed error, or of one that is mostly 0, show too little of how much it varies.
    pooled = ((n - 1) * variance).sum() / (n - 1).sum()
    return replace(
        _untested(question), groups=groups, small=small, gap=float(np.ptp(mean)) / scale,
        p_value=welch(mean, np.maximum(variance, pooled), n),
    )  # fmt: skip


def _untested(question: Question) -> Test:
    return Test(question.attribute, question.metric, question.target, question.control)


def _blocks(evidence: Evidence, attribute: str, metric: str, target: str) -> list[tuple[Question, list[int]]]:
    """Questions without counts, and the cells of each: one for each combination of control values that a row has."""
    groups, found, none = evidence.groups, [], np.empty(0)
    labels = list(groups.index)
    blocks = math.prod(groups.shape[: groups.controls])
    width = groups.size // blocks
    for block in range(blocks):
        cells = [i for i in range(block * width, (block + 1) * width) if evidence.size[i]]
        if cells:
            keys = [as_tuple(labels[i]) for i in cells]
            names = tuple(unwrapped(key[groups.controls :]) for key in keys)
            control = keys[0][: groups.controls]
            found.append((Question(attribute, metric, target, control, names, none, none), cells))
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
