"""The tests of a gate and the verdict that follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_bias_audit.gate import GOOD_WHEN_HIGH, Gate, Verdict
from groundwire_bias_audit.null import adjust, homogeneity


@dataclass(frozen=True)
class Test:
    """One gated gap.

    Attributes:
        attribute: The sensitive feature (``"a x b"`` for the crossing of all).
        metric: The rate.
        target: Output, for tasks with several; else "".
        control: Values of the control features, ``()`` without.
        groups: Groups with enough rows.
        small: Groups with too few rows in the denominator.
        gap: max - min of the rate over ``groups``.
        p_value: Of the permutation test of equal rates.
        p_adjusted: Corrected over the whole audit; NaN where nothing could be tested.
        disparity: Whether the gap is beyond the gate.
        outliers: If it is: the groups whose removal leaves no significant gap, worst first.
    """

    __test__ = False  # pytest: this is no test class

    attribute: str
    metric: str
    target: str = ""
    control: tuple[Any, ...] = ()
    groups: tuple[Any, ...] = ()
    small: tuple[Any, ...] = ()
    gap: float = math.nan
    p_value: float = math.nan
    p_adjusted: float = math.nan
    disparity: bool = False
    outliers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Question:
    """Counts of one possible :class:`Test`: successes and trials of each group (effective ones with weights)."""

    attribute: str
    metric: str
    target: str
    control: tuple[Any, ...]
    groups: tuple[Any, ...]
    successes: NDArray[Any]
    trials: NDArray[Any]


def ask(questions: Sequence[Question], gate: Gate, seed: int = 0) -> list[Test]:
    """Answer all questions of an audit together, so that the correction counts them all."""
    draws = gate.permutations(len(questions))
    held = [_enough(question, gate) for question in questions]
    p_values = [
        homogeneity(k, n, draws=draws, rng=np.random.default_rng([seed, i])) if len(n) > 1 else math.nan
        for i, (_, k, n) in enumerate(held)
    ]
    adjusted = adjust(p_values, gate.correction)
    return [
        _test(question, kept, p, float(corrected), gate, draws, len(questions))
        for question, kept, p, corrected in zip(questions, held, p_values, adjusted, strict=True)
    ]


def decide(tests: Sequence[Test]) -> Verdict:
    """The verdict of an audit: a disparity if there is one, a pass only if every group could be judged.

    Example:
        >>> print(decide([Test("sex", "accuracy", small=("f",))]))
        insufficient data
    """
    if any(test.disparity for test in tests):
        return Verdict.DISPARITY
    judged = bool(tests) and all(not test.small and len(test.groups) > 1 for test in tests)
    return Verdict.PASS if judged else Verdict.INSUFFICIENT


_Held = tuple[tuple[Any, ...], NDArray[np.int64], NDArray[np.int64]]


def _enough(question: Question, gate: Gate) -> _Held:
    """Groups with enough rows; effective counts are rounded down to whole rows."""
    enough = question.trials >= gate.min_count
    n = np.floor(question.trials[enough]).astype(np.int64)
    with np.errstate(invalid="ignore"):
        rates = question.successes[enough] / question.trials[enough]
    groups = tuple(group for group, good in zip(question.groups, enough, strict=True) if good)
    return groups, np.rint(rates * n).astype(np.int64), n


def _test(question: Question, held: _Held, p: float, adjusted: float, gate: Gate, draws: int, tests: int) -> Test:
    groups, k, n = held
    small = tuple(group for group in question.groups if group not in groups)
    rates = k / n
    gap = float(rates.max() - rates.min()) if len(n) > 1 else math.nan
    disparity = len(n) > 1 and gap > gate.tolerance and adjusted <= gate.alpha
    level = gate.alpha if gate.correction == "none" else gate.alpha / tests
    outliers = _outliers(question.metric, held, gate.tolerance, level, draws) if disparity else ()
    return Test(
        question.attribute, question.metric, question.target, question.control,
        groups, small, gap, p, adjusted, disparity, outliers,
    )  # fmt: skip


def _outliers(metric: str, held: _Held, tolerance: float, level: float, draws: int) -> tuple[Any, ...]:
    """Leave out the most deviating group until the rest shows no disparity; of two groups the worse one is named.

    Naming a further group needs the strictest level of the correction, so that naming adds no false accusations.
    """
    found: list[Any] = []
    groups, k, n = held
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
