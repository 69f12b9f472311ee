"""When an audit fails: a gap that is large and real, judged by a test whose null is right."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_bias_audit.null import CORRECTIONS, adjust, homogeneity

#: Rates in which a gap can be gated.
GATED = (
    "accuracy",
    "selection_rate",
    "true_positive_rate",
    "true_negative_rate",
    "false_positive_rate",
    "false_negative_rate",
    "precision",
)
#: What metrics are called elsewhere, for the hint at a wrong name.
SYNONYMS = {
    "acc": "accuracy", "auc": "roc_auc", "auroc": "roc_auc", "ece": "calibration_error", "mae": "mean_absolute_error",
    "mse": "mean_squared_error", "r2": "r2_score", "ppv": "precision", "demographic_parity": "selection_rate",
    "tpr": "true_positive_rate", "recall": "true_positive_rate", "sensitivity": "true_positive_rate",
    "equal_opportunity": "true_positive_rate", "tnr": "true_negative_rate", "specificity": "true_negative_rate",
    "fpr": "false_positive_rate", "fnr": "false_negative_rate",
}  # fmt: skip
#: A low value of these is the bad side; a high value of the others.
GOOD_WHEN_HIGH = frozenset(GATED) - {"false_positive_rate", "false_negative_rate"}


class Verdict(Enum):
    """What an audit concludes; printed as ``pass``, ``disparity`` or ``insufficient data``.

    Example:
        >>> print(Verdict.PASS, Verdict.INSUFFICIENT)
        pass insufficient data
    """

    PASS = "pass"
    DISPARITY = "disparity"
    INSUFFICIENT = "insufficient data"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Gate:
    """When a gap between groups is a disparity: larger than ``tolerance`` and significant at ``alpha``.

    The gap is max - min over groups. Its significance is that of an exact permutation test of equal rates
    (:func:`groundwire_bias_audit.null.homogeneity`), corrected over metrics x attributes. A group with a denominator
    under ``min_count`` makes the verdict ``insufficient data`` unless the other groups already show a disparity.

    Args:
        tolerance: Largest gap that is accepted, in [0, 1).
        alpha: Chance of a false alarm over all tests together, in (0, 1).
        metrics: Gated rates. The default leaves selection_rate out: it differs wherever base rates differ.
        min_count: Rows that each denominator of each group must have.
        correction: "holm", "bh" or "none".
        intersections: Also gate the crossing of all sensitive features.
        draws: Permutations of each test, raised where the correction needs more.

    Raises:
        TypeError: ``tolerance`` or ``alpha`` is no number.
        ValueError: An argument is out of its range, or a metric is unknown (the nearest is shown).

    Example:
        >>> Gate(tolerance=0.1).metrics
        ('accuracy', 'true_positive_rate', 'false_positive_rate')
    """

    tolerance: float = 0.05
    alpha: float = 0.05
    metrics: Sequence[str] | None = None
    min_count: int = 30
    correction: str = "holm"
    intersections: bool = False
    draws: int = 2000
    named: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, hint in (("tolerance", self.tolerance, "such as 0.05"), ("alpha", self.alpha, "such as 0.05")):
            if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
                raise TypeError(f"Gate needs a {name}, got {value!r} -> give a number, {hint}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance!r} (0.05 means five percentage points)")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be in (0, 1), got {self.alpha!r}")
        if self.min_count < 1 or self.draws < 100:
            raise ValueError(f"min_count >= 1 and draws >= 100 are needed, got {self.min_count} and {self.draws}")
        if self.correction not in CORRECTIONS:
            raise ValueError(f"correction must be one of {', '.join(CORRECTIONS)}, got {self.correction!r}")
        object.__setattr__(self, "named", self.metrics is not None)
        given = ("accuracy", "true_positive_rate", "false_positive_rate") if self.metrics is None else self.metrics
        if isinstance(given, str) or not given:
            raise ValueError(f"metrics must be a list of rates, got {given!r}")
        for metric in given:
            check_metric(metric, GATED)
        object.__setattr__(self, "metrics", tuple(given))


def check_metric(name: str, known: Sequence[str]) -> str:
    """``name``, if it is known.

    Raises:
        ValueError: It is not; the nearest known name is shown.

    Example:
        >>> check_metric("acuracy", ("accuracy", "precision"))
        Traceback (most recent call last):
            ...
        ValueError: unknown metric 'acuracy'; did you mean 'accuracy'? Known: accuracy, precision
    """
    if name not in known:
        meant = SYNONYMS.get(str(name).lower())
        near = meant if meant in known else difflib.get_close_matches(str(name), known, 1, 0.0)[0]
        raise ValueError(f"unknown metric {name!r}; did you mean {near!r}? Known: {', '.join(known)}")
    return name


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
    draws = max(gate.draws, math.ceil(20 * len(questions) / gate.alpha) if gate.correction != "none" else 0)
    draws = min(draws, 100_000)
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
