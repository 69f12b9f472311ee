"""Did a rate change more for some groups than for others? Permutations of the changes among the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from groundwire_bias_audit.functional import Counts
from groundwire_bias_audit.gate import GOOD_WHEN_HIGH
from groundwire_bias_audit.judging import Test
from groundwire_bias_audit.null import sequential


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
    """Did ``metric`` change alike? ``changes`` are rows by which it falls, by which it rises, and all, by group."""
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
