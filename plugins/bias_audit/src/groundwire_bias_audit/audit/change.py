"""Two models on the same rows: what changed, for whom, and whether it changed more for some than for others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from groundwire_bias_audit.audit.gate import GOOD_WHEN_HIGH, Gate, Test, Verdict, verdict_of
from groundwire_bias_audit.audit.groups import Groups, as_tuple, by_target, unwrapped
from groundwire_bias_audit.audit.hypothesis_tests import adjust, mcnemar, sequential
from groundwire_bias_audit.audit.intervals import quantiles, resample
from groundwire_bias_audit.audit.predictions import Outputs
from groundwire_bias_audit.audit.rates import Counts, ratio


def change_test(
    worse: Counts, better: Counts, trials: Counts, *, draws: int = 2000, rng: np.random.Generator | None = None
) -> float:
    """P value of "the mean change is the same in all groups", each row changing by -1, 0 or +1.

    The null is that the changes are exchangeable among the rows, so counts by group are drawn hypergeometrically.

    Args:
        worse: Rows of each group that change by -1.
        better: Rows that change by +1.
        trials: All rows of each group.
        draws: Most permutations.
        rng: Source of randomness; seeded with 0 when left out.

    Example:
        >>> a, b = np.array([30, 2]), np.array([0, 0])
        >>> change_test(a, b, np.array([100, 100])) < 0.001
        True
    """
    held = trials > 0
    worse, better, trials = worse[held], better[held], trials[held]
    if len(trials) < 2 or worse.sum() + better.sum() == 0:
        return 1.0
    source = rng or np.random.default_rng(0)
    observed = ((better - worse) ** 2 / trials).sum()

    def exceeding(count: int) -> int:
        down = _spread(trials, int(worse.sum()), count, source)
        up = _spread(trials - down, int(better.sum()), count, source)
        return int((((up - down) ** 2 / trials).sum(axis=1) >= observed * (1 - 1e-9)).sum())

    return sequential(exceeding, draws)


def _spread(room: Counts, marked: int, draws: int, rng: np.random.Generator) -> Counts:
    """Put ``marked`` marks on rows at random; ``room`` is (G,) or, by draw, (B, G). Returns (B, G)."""
    room = np.broadcast_to(room, (draws, room.shape[-1]))
    left, marks = room.sum(axis=1), np.full(draws, marked)
    found = np.zeros(room.shape, np.int64)
    for group in range(room.shape[1] - 1):
        left = left - room[:, group]
        found[:, group] = rng.hypergeometric(marks, room[:, group] + left - marks, room[:, group])
        marks = marks - found[:, group]
    found[:, -1] = marks
    return found


def tested_change(
    changes: Counts, groups: Sequence[Any], metric: str, least: int, draws: int, rng: np.random.Generator
) -> Test:
    """Test whether ``metric`` changed alike, given the rows by which it falls, by which it rises, and all, by group."""
    enough = changes[2] >= least
    judged, small = (
        tuple(g for g, ok in zip(groups, enough, strict=True) if bool(ok) is which) for which in (True, False)
    )
    down, up, trials = changes[:, enough]
    if len(trials) < 2:
        return Test("", "", groups=judged, small=small)
    mean = (up - down) / trials
    bad = mean.min() if metric in GOOD_WHEN_HIGH else mean.max()
    worst = tuple(g for g, m in zip(judged, mean, strict=True) if m == bad)
    p = change_test(down, up, trials, draws=draws, rng=rng)
    return Test("", "", groups=judged, small=small, gap=float(np.ptp(mean)), p_value=p, outliers=worst)


def broken_mended(pairs: Counts) -> tuple[Counts, Counts]:
    """Rows that became wrong and rows that became right, from ``[..., label, before, after]``."""
    broken = pairs[..., 1, 1, 0] + pairs[..., 0, 0, 1]
    return broken, pairs[..., 1, 0, 1] + pairs[..., 0, 1, 0]


def _accuracy(pairs: Counts) -> tuple[Counts, Counts, Counts]:
    return *broken_mended(pairs), pairs.sum(axis=(1, 2, 3))


def _selected(pairs: Counts, label: int) -> tuple[Counts, Counts, Counts]:
    return pairs[:, label, 1, 0], pairs[:, label, 0, 1], pairs[:, label].sum(axis=(1, 2))


def _rejected(pairs: Counts, label: int) -> tuple[Counts, Counts, Counts]:
    fewer, more, trials = _selected(pairs, label)
    return more, fewer, trials


#: Rows by which a rate falls, by which it rises, and those of its denominator. That of precision itself changes.
CHANGES: dict[str, Any] = {
    "accuracy": _accuracy,
    "true_positive_rate": lambda pairs: _selected(pairs, 1),
    "false_negative_rate": lambda pairs: _rejected(pairs, 1),
    "false_positive_rate": lambda pairs: _selected(pairs, 0),
    "true_negative_rate": lambda pairs: _rejected(pairs, 0),
    "selection_rate": lambda pairs: (
        pairs[:, :, 1, 0].sum(axis=1), pairs[:, :, 0, 1].sum(axis=1), pairs.sum(axis=(1, 2, 3))
    ),
}  # fmt: skip


def pair_counts(codes: NDArray[Any], first: Outputs, second: Outputs, groups: int) -> tuple[Counts, Counts]:
    """Counts of pairs of predictions, and of flips.

    Args:
        codes: Group of each row.
        first: The baseline's outputs.
        second: The other model's, on the same rows.
        groups: Number of groups.

    Returns:
        ``[group, target, label, first prediction, second prediction]``, where "prediction" is "right" and the label 1
        for a multiclass task, and ``[group, target]`` rows whose prediction differs.
    """
    if first.task == "multiclass":
        labels = np.ones((len(codes), 1), np.int64)
        a, b = first.correct[:, None], second.correct[:, None]
        flipped = (first.predictions != second.predictions)[:, None]
    else:
        labels, a, b = first.labels, first.predictions, second.predictions
        flipped = a != b
    pairs = [
        np.bincount(
            codes.astype(np.int64) * 8 + labels[:, t] * 4 + a[:, t] * 2 + b[:, t], minlength=8 * groups
        ).reshape(groups, 2, 2, 2)
        for t in range(a.shape[1])
    ]
    flips = [np.bincount(codes, flipped[:, t], minlength=groups) for t in range(a.shape[1])]
    return np.stack(pairs, axis=1), np.stack(flips, axis=1).astype(np.int64)


@dataclass(frozen=True)
class Comparison:
    """Changes from a baseline (the dense model) to another model on the same rows.

    Attributes:
        groups: The cells.
        names: Of the targets.
        pairs: ``[group, target, label, baseline prediction, prediction]``.
        flips: ``[group, target]`` rows whose prediction differs.
        gate: When a change is a disparity: it differs between groups by more than ``tolerance``, significantly.
        n_boot: Paired bootstrap draws.
        ci_quantiles: Of the intervals.
        random_state: Seed.
    """

    groups: Groups
    names: tuple[Any, ...]
    pairs: Counts
    flips: Counts
    gate: Gate
    n_boot: int = 1000
    ci_quantiles: tuple[float, ...] = (0.025, 0.975)
    random_state: int = 0

    def to_frame(self, features: Sequence[str] | None = None, target: int | None = None) -> pd.DataFrame:
        """One row a group: accuracies, their change with a paired interval, flips, and McNemar's P value.

        ``broken`` rows were right before and are wrong now, ``mended`` the other way. Of several targets all are shown,
        as the last level of the index, unless ``target`` gives the position of one. P values are Holm-corrected over
        all rows shown.
        """
        names = self.groups.sensitive if features is None else tuple(features)
        count = self.pairs.shape[1]
        if target is not None or count == 1:
            found = self._of_target(names, target or 0)
        else:
            found = by_target({self.names[t]: self._of_target(names, t) for t in range(count)})
        return found.assign(mcnemar_p_adjusted=adjust(found["mcnemar_p"].to_numpy()))

    def _of_target(self, names: Sequence[str], target: int) -> pd.DataFrame:
        index = self.groups.keep(names).index
        pairs = self.groups.marginal(self.pairs, names)[:, target]
        flips = self.groups.marginal(self.flips, names)[:, target]
        n = pairs.sum(axis=(1, 2, 3))
        broken, mended = broken_mended(pairs)
        p = [mcnemar(int(b), int(m)) if size else math.nan for b, m, size in zip(broken, mended, n, strict=True)]
        draws = resample(pairs, self.n_boot, np.random.default_rng(self.random_state))
        down, up = broken_mended(draws)
        bounds = quantiles(ratio(up - down, draws.sum(axis=(2, 3, 4))), self.ci_quantiles)
        right = pairs[:, 0, 0].sum(axis=1) + pairs[:, 1, 1].sum(axis=1)
        columns = {
            "count": n, "baseline_accuracy": ratio(right, n), "accuracy": ratio(right + mended - broken, n),
            "accuracy_change": ratio(mended - broken, n), "change_low": bounds[0], "change_high": bounds[-1],
            "flip_rate": ratio(flips, n), "broken": broken, "mended": mended, "mcnemar_p": p,
        }  # fmt: skip
        return pd.DataFrame(columns, index=index)

    @cached_property
    def tests(self) -> list[Test]:
        """Tests of whether the gated rates (but precision) changed more in some groups, for every attribute."""
        assert self.gate.metrics is not None
        single = not self.pairs[:, :, 0].any()  # "right" of a multiclass task
        metrics = [m for m in self.gate.metrics if m == "accuracy" or not single]
        asked = [
            (names, metric, target)
            for names in self.gate.attributes(self.groups.sensitive)
            for target in range(self.pairs.shape[1])
            for metric in metrics
            if metric in CHANGES
        ]
        blocks = math.prod(self.groups.shape[: self.groups.controls])
        draws = self.gate.permutations(len(asked) * blocks)
        raw = [test for i, question in enumerate(asked) for test in self._raw(*question, i, draws)]
        adjusted = adjust([test.p_value for test in raw], self.gate.correction)
        return [_judged(test, float(p), self.gate) for test, p in zip(raw, adjusted, strict=True)]

    @property
    def verdict(self) -> Verdict:
        """Verdict on how evenly the change itself is distributed; an old disparity that stayed as it was passes."""
        return verdict_of(self.tests)

    def _raw(self, names: list[str], metric: str, target: int, seed: int, draws: int) -> Iterator[Test]:
        """One test for each combination of control values, before the correction."""
        kept = self.groups.keep(names)
        pairs = self.groups.marginal(self.pairs, names)[:, target]
        changes = np.stack(CHANGES[metric](pairs))
        present = pairs.sum(axis=(1, 2, 3)) > 0
        labels = [as_tuple(label) for label in kept.index]
        target_name = str(self.names[target]) if len(self.names) > 1 and self.pairs.shape[1] > 1 else ""
        controls, attribute = kept.controls, " x ".join(names)
        width = kept.size // math.prod(kept.shape[:controls])
        for start in range(0, kept.size, width):
            cells = [cell for cell in range(start, start + width) if present[cell]]
            if cells:
                groups = [unwrapped(labels[cell][controls:]) for cell in cells]
                rng = np.random.default_rng([self.random_state, seed, start])
                found = tested_change(changes[:, cells], groups, metric, self.gate.min_count, draws, rng)
                yield replace(
                    found, attribute=attribute, metric=metric, target=target_name, control=labels[start][:controls]
                )


def _judged(test: Test, adjusted: float, gate: Gate) -> Test:
    disparity = test.gap > gate.tolerance and adjusted <= gate.alpha
    outliers = test.outliers if disparity else ()
    return replace(
        test, metric=f"{test.metric}_change", p_adjusted=adjusted, disparity=disparity, outliers=outliers
    )  # fmt: skip
