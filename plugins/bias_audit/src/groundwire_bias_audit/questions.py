"""The questions that a gate asks of an audit's sums, and their answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from groundwire_bias_audit.evidence import Evidence
from groundwire_bias_audit.functional import Counts, Floats, parts
from groundwire_bias_audit.gate import Gate
from groundwire_bias_audit.grouping import as_tuple
from groundwire_bias_audit.judging import Question, Test, ask
from groundwire_bias_audit.null import adjust, welch


def tests_of(evidence: Evidence, gate: Gate, random_state: int) -> list[Test]:
    """Every gated gap with its P value, corrected over all of them."""
    if evidence.task == "regression":
        return _regression_tests(evidence, gate)
    return ask(_questions(evidence, gate), gate, random_state)


def _questions(evidence: Evidence, gate: Gate) -> list[Question]:
    assert gate.metrics is not None
    found = []
    features = evidence.groups.sensitive
    attributes = [[name] for name in features]
    if gate.intersections and len(features) > 1:
        attributes.append(list(features))
    for names in attributes:
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
    if evidence.squares is not None:
        k, n = _effective(k, n, squares, metric)
    return [
        question
        for t, name in enumerate(names)
        for question in _by_control(evidence, attribute, metric, str(name), k[:, t], n[:, t])
    ]


def _regression_tests(evidence: Evidence, gate: Gate) -> list[Test]:
    """Gaps of mean and mean absolute error in standard deviations of the label, by Welch's test from sums."""
    whole = evidence.overall().moments
    assert whole is not None
    n, label, squared = (float(whole[:, i].sum()) for i in (0, 1, 5))
    scale = math.sqrt(max(squared / n - (label / n) ** 2, 0.0)) or 1.0
    raw = [
        test
        for name in evidence.groups.sensitive
        for metric in ("mean_error", "mean_absolute_error")
        for test in _regression_questions(evidence.of([name]), gate, name, metric, scale)
    ]
    adjusted = adjust([test.p_value for test in raw], gate.correction)
    return [
        replace(test, p_adjusted=float(p), disparity=bool(test.gap > gate.tolerance and p <= gate.alpha))
        for test, p in zip(raw, adjusted, strict=True)
    ]


def _regression_questions(evidence: Evidence, gate: Gate, attribute: str, metric: str, scale: float) -> list[Test]:
    assert evidence.moments is not None
    total = evidence.moments[:, 3] if metric == "mean_absolute_error" else np.diff(evidence.moments[:, 1:3])[:, 0]
    sums = np.stack([total, evidence.moments[:, 4]], axis=1)
    return [
        _welch(question, sums[cells], evidence.size[cells], scale, gate)
        for question, cells in _blocks(evidence, attribute, metric, "")
    ]


def _welch(question: Question, sums: Floats, size: Floats, scale: float, gate: Gate) -> Test:
    enough = size >= gate.min_count
    groups, small = (
        tuple(g for g, ok in zip(question.groups, enough, strict=True) if bool(ok) is which) for which in (True, False)
    )
    n, total, squares = size[enough].astype(float), sums[enough, 0], sums[enough, 1]
    if len(n) < 2:
        return replace(_untested(question), groups=groups, small=small)
    means = total / n
    variances = np.maximum(squares - n * means**2, 0) / (n - 1)
    return replace(
        _untested(question), groups=groups, small=small, gap=float(np.ptp(means)) / scale,
        p_value=welch(means, variances, n),
    )  # fmt: skip


def _untested(question: Question) -> Test:
    return Test(question.attribute, question.metric, question.target, question.control)


def _by_control(evidence: Evidence, attribute: str, metric: str, target: str, k: Floats, n: Floats) -> list[Question]:
    """One question for each combination of control values; combinations that no row has are no groups."""
    found = _blocks(evidence, attribute, metric, target)
    return [replace(question, successes=k[cells], trials=n[cells]) for question, cells in found]


def _blocks(evidence: Evidence, attribute: str, metric: str, target: str) -> list[tuple[Question, list[int]]]:
    """Questions without counts, and the cells of each."""
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


def _effective(k: Floats, n: Floats, squares: Any, metric: str) -> tuple[Floats, Floats]:
    """Kish's effective numbers of rows, (sum w)^2 / sum w^2, with the weighted rates."""
    q = n if squares is None else parts(squares, metric)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(q > 0, n**2 / q, 0.0)
        return np.where(n > 0, k / n, 0.0) * effective, effective


def _all_right(squares: Counts) -> Counts:
    """Squared weights of all rows of each group, as the counts of "right" have them."""
    found = np.zeros((len(squares), 1, 2, 2))
    found[:, 0, 1, 1] = squares[:, 0].sum(axis=(1, 2))
    return found


def unwrapped(label: Any) -> Any:
    """The only value of a tuple of one, and anything else as it is."""
    return label[0] if isinstance(label, tuple) and len(label) == 1 else label


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
