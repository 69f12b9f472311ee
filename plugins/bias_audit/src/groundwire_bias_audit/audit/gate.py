"""Gate of an audit: its settings, the tests that it leads to, and the verdict."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
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
    """Rule by which a gap between groups is a disparity: shown to be larger than ``tolerance``.

    Disparity: the difference of two groups exceeds ``tolerance`` by an exact test
    (:mod:`groundwire_bias_audit.audit.rate_differences`) at level ``alpha`` over all metrics, attributes, targets and
    pairs of groups of the audit together. Pass: there is none, and at least two groups of ``min_count`` rows hold 90 %
    of the rows of every gated rate; smaller groups are listed as not judged. Else the data are insufficient.

    Args:
        tolerance: Largest gap that is accepted, in [0, 1).
        alpha: Chance of a false alarm over all tests together, in (0, 1).
        metrics: Gated rates. The default leaves selection_rate out: it differs wherever base rates differ.
        min_count: Rows that a group's denominator must have for the group to be judged.
        correction: "holm" (chance of any false alarm), "bh" (share of false alarms) or "none".
        intersections: Also gate the crossing of all sensitive features.
        draws: Deprecated, without effect: the tests draw nothing any more.

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
    draws: int | None = None
    named: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, hint in (("tolerance", self.tolerance, "such as 0.05"), ("alpha", self.alpha, "such as 0.05")):
            if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
                raise TypeError(f"Gate needs a {name}, got {value!r} -> give a number, {hint}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance!r} (0.05 means five percentage points)")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be in (0, 1), got {self.alpha!r}")
        if self.min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {self.min_count}")
        if self.draws is not None:
            warnings.warn("Gate(draws=...) has no effect: the tests are exact", DeprecationWarning, stacklevel=3)
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
    """One gated gap between groups, or (``change``) one gated change from a baseline within groups.

    Attributes:
        attribute: The sensitive feature (``"a x b"`` for the crossing of all).
        metric: The rate.
        target: Output, for tasks with several; else "".
        control: Values of the control features, ``()`` without.
        groups: Groups with enough rows.
        small: Groups with too few rows in the denominator; they are not judged.
        gap: max - min of the rate over ``groups``; of a change the largest loss of a group.
        p_value: Smallest one of "the difference of two groups is within the tolerance" (of a change: "the loss is").
        p_adjusted: Corrected over the whole audit; NaN where nothing could be tested.
        disparity: True if a difference is shown to be beyond the tolerance.
        outliers: If it is: groups without which no difference would be, worst first.
        rates: The rate (of a change: the change) of each of ``groups``.
        rows: Rows in the denominator of each of ``groups``, effective ones with weights.
        insufficient: Reason for which this test does not let the audit pass, else "".
        change: True for a change from a baseline.
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
    rates: tuple[float, ...] = ()
    rows: tuple[float, ...] = ()
    insufficient: str = ""
    change: bool = False
    limits: tuple[Callable[[], float], Callable[[], float]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def at_least(self) -> float:
        """Lower end of the simultaneous interval of the true ``gap`` of the judged groups."""
        return math.nan if self.limits is None else self.limits[0]()

    @cached_property
    def at_most(self) -> float:
        """Upper end of it: the data rule out larger gaps. All of an audit hold together with a chance of 1 - alpha."""
        return math.nan if self.limits is None else self.limits[1]()

    @property
    def bounds(self) -> tuple[float, float]:
        """Both ends."""
        return self.at_least, self.at_most

    @property
    def name(self) -> str:
        """Metric, target, attribute and control values in words.

        Example:
            >>> Test("sex", "accuracy", "hat", ("north",)).name
            'accuracy of hat by sex within north'
        """
        target = f" of {self.target}" if self.target else ""
        within = f" within {', '.join(map(str, self.control))}" if self.control else ""
        return f"{self.metric}{target} by {self.attribute}{within}"


def verdict_of(tests: Sequence[Test]) -> Verdict:
    """Verdict of an audit: a disparity if there is one, a pass only if nothing stands against it.

    Example:
        >>> print(verdict_of([Test("sex", "accuracy", insufficient="there is one group")]), verdict_of([]))
        insufficient data insufficient data
    """
    if any(test.disparity for test in tests):
        return Verdict.DISPARITY
    return Verdict.PASS if tests and not any(test.insufficient for test in tests) else Verdict.INSUFFICIENT


def describe(test: Test) -> str:
    """Return a test as one sentence, with the values of the groups furthest apart.

    Example:
        >>> describe(Test("sex", "accuracy", gap=0.2, p_adjusted=0.001, disparity=True, outliers=("f",)))
        'accuracy by sex differs by 0.200 (adjusted P = 0.001); stands out: f'
        >>> describe(Test("sex", "accuracy", groups=("f", "m"), gap=0.2, p_adjusted=0.5, rates=(0.7, 0.9)))
        'accuracy by sex differs by 0.200: 0.700 for f, 0.900 for m (adjusted P = 0.5)'
    """
    named = {group: rate for group, rate in zip(test.groups, test.rates, strict=True) if not math.isnan(rate)}
    values = ""
    if named:
        ends = dict.fromkeys((min(named, key=named.__getitem__), max(named, key=named.__getitem__)))
        values = ": " + ", ".join(f"{named[group]:{'+' if test.change else ''}.3f} for {group}" for group in ends)
    shown = f", at least by {test.at_least:.3f}" if test.disparity and test.at_least > 0 else ""
    worst = f"; stands out: {', '.join(map(str, test.outliers))}" if test.outliers else ""
    verb = ("got worse by" if test.gap > 0 else "got worse by at most") if test.change else "differs by"
    return f"{test.name} {verb} {test.gap:.3f}{values}{shown} (adjusted P = {test.p_adjusted:.2g}){worst}"


def conclusion(tests: Sequence[Test], gate: Gate) -> str:
    """Return what follows from the tests in words: the disparities, or the largest gap ruled out, or what is missing.

    Example:
        >>> conclusion([Test("sex", "accuracy", insufficient="sex has one group")], Gate())
        'sex has one group'
    """
    verdict = verdict_of(tests)
    told = [describe(test) for test in sorted(tests, key=lambda test: -test.gap) if test.disparity]
    if verdict is Verdict.PASS:
        widest = max(tests, key=lambda test: -1.0 if math.isnan(test.at_most) else test.at_most)
        if widest.change:
            told = [f"no group is shown to have lost more than {gate.tolerance:g}, and the data rule out losses above "
                    f"{_rounded_up(widest.at_most)} ({widest.name})"]  # fmt: skip
        else:
            told = [f"no gap is shown to exceed {gate.tolerance:g}, and the data rule out gaps above "
                    f"{_rounded_up(widest.at_most)} ({widest.name})"]  # fmt: skip
    if verdict is Verdict.INSUFFICIENT:
        told = list(dict.fromkeys(test.insufficient for test in tests if test.insufficient)) or ["nothing is gated"]
        told = told[:5] + ([f"and {len(told) - 5} more"] if len(told) > 5 else [])
    return "; ".join([*told, *_not_judged(tests, gate)])


def _rounded_up(value: float) -> str:
    return f"{math.ceil(value * 1000) / 1000:.3f}"


def _not_judged(tests: Sequence[Test], gate: Gate) -> list[str]:
    found = [(test.attribute, group) for test in tests for group in test.small]
    names = [f"{group} ({attribute})" for attribute, group in dict.fromkeys(found)]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    some = f"not judged for at least one rate, with fewer than {gate.min_count} rows: {', '.join(names[:10])}{more}"
    return [some] if names else []


def not_gated(task: str, gate: Gate) -> str:
    """Return which rates the gate does not judge, as a sentence.

    Example:
        >>> not_gated("binary", Gate(metrics=["accuracy", "true_positive_rate", "precision"]))
        'Not judged: selection_rate, true_negative_rate, false_positive_rate, false_negative_rate.'
    """
    if task == "regression":
        return "Judged are mean_error and mean_absolute_error, in standard deviations of the label, and nothing else."
    if task == "multiclass" and not gate.named:
        return "Judged is accuracy over all classes; the rates of single classes are not."
    left = [name for name in GATED if name not in (gate.metrics or ())]
    return f"Not judged: {', '.join(left)}." if left else "All rates are judged."
