"""Gate of an audit: its settings, the tests that it leads to, and the verdict."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from groundwire_bias_audit.audit.hypothesis_tests import CORRECTIONS

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
    """Conclusion of an audit; printed as ``pass``, ``disparity`` or ``insufficient data``.

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
    """Rule by which a gap between groups is a disparity: larger than ``tolerance`` and significant at ``alpha``.

    The gap is max - min over groups. Its significance is that of an exact permutation test of equal rates
    (:func:`groundwire_bias_audit.audit.hypothesis_tests.homogeneity`), corrected over metrics x attributes. A group
    with a denominator under ``min_count`` makes the verdict ``insufficient data`` unless the others already show a
    disparity.

    Args:
        tolerance: Largest gap that is accepted, in [0, 1).
        alpha: Chance of a false alarm over all tests together, in (0, 1).
        metrics: Gated rates. The default leaves selection_rate out: it differs wherever base rates differ.
        min_count: Rows that each denominator of each group must have.
        correction: "holm", "bh" or "none".
        intersections: Also gate the crossing of all sensitive features.
        draws: Permutations of each test, raised where the correction needs more; fewer where the first 2,000 decide.

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

    def attributes(self, features: Sequence[str]) -> list[list[str]]:
        """Return what is gated: each feature, and the crossing of all where that was asked for.

        Example:
            >>> Gate(intersections=True).attributes(["sex", "race"])
            [['sex'], ['race'], ['sex', 'race']]
        """
        crossed = [list(features)] if self.intersections and len(features) > 1 else []
        return [[name] for name in features] + crossed

    def permutations(self, tests: int) -> int:
        """Draws of each of so many tests: a P value must be able to fall below the strictest level of the correction.

        Example:
            >>> [Gate().permutations(tests) for tests in (3, 100, 1000, 10_000)]
            [2000, 40000, 100000, 400000]
        """
        if self.correction == "none":
            return self.draws
        wanted = max(self.draws, math.ceil(20 * tests / self.alpha))
        return min(wanted, max(100_000, math.ceil(2 * tests / self.alpha)))


def checked_gate(gate: Any) -> Gate:
    """``gate``, or the default one.

    Raises:
        TypeError: It is no :class:`Gate`.
    """
    if gate is None:
        return Gate()
    if not isinstance(gate, Gate):
        raise TypeError(f"gate must be a Gate, such as Gate(tolerance=0.05), got {gate!r}")
    return gate


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


def verdict_of(tests: Sequence[Test]) -> Verdict:
    """The verdict of an audit: a disparity if there is one, a pass only if every group could be judged.

    Example:
        >>> print(verdict_of([Test("sex", "accuracy", small=("f",))]))
        insufficient data
    """
    if any(test.disparity for test in tests):
        return Verdict.DISPARITY
    judged = bool(tests) and all(not test.small and len(test.groups) > 1 for test in tests)
    return Verdict.PASS if judged else Verdict.INSUFFICIENT
