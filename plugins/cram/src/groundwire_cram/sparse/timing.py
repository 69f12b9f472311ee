"""Which of two ways is faster, beyond doubt."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

#: What the faster way must be ahead by, so that noise does not decide.
MARGIN = 1.05
#: Rounds at least and at most, and the seconds after which there is no further one.
_FEWEST, _MOST, _BUDGET = 9, 60, 0.3
#: 99 % of a normal distribution are below this many standard deviations.
_NORMAL_99 = 2.33
#: A round repeats a call until it takes this many seconds, because clocks and caches disturb short ones.
_ROUND = 1e-3

#: Takes two ways and returns, for each of some rounds, the seconds of a call of each.
Measure = Callable[[Callable[[], Any], Callable[[], Any]], Sequence[tuple[float, float]]]


class Timing(NamedTuple):
    """Seconds of a call: medians over the rounds; ``certain`` is what the median speed-up exceeds with 99 %."""

    dense: float
    sparse: float
    speedup: float
    certain: float


def measure(dense: Callable[[], Any], sparse: Callable[[], Any]) -> list[tuple[float, float]]:
    """Seconds of a call of ``dense`` and of ``sparse``, in turn, so that a drift of the machine hits both alike.

    With one torch thread on the CPU these are seconds of processor time, else of the wall clock.
    """
    calls = []
    for way in (dense, sparse):
        way()  # The first call is slower for reasons of its own.
        calls.append(max(1, round(_ROUND / max(_seconds(way, 1), 1e-9))))
    rounds: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(rounds) < _FEWEST or (len(rounds) < _MOST and time.perf_counter() - start < _BUDGET):
        if len(rounds) % 2:
            second = _seconds(sparse, calls[1])
            rounds.append((_seconds(dense, calls[0]), second))
        else:
            rounds.append((_seconds(dense, calls[0]), _seconds(sparse, calls[1])))
    return rounds


def summary(rounds: Sequence[tuple[float, float]]) -> Timing:
    """What the rounds say.

    The bound is an order statistic of the rounds' ratios (the sign test), so that outliers, which other programs on the
    machine cause, count as one round each. With few rounds it is the smallest ratio.

    Example:
        >>> summary([(2.0, 1.0), (2.0, 1.0), (3.0, 1.0), (1.5, 1.0)])
        Timing(dense=2.0, sparse=1.0, speedup=2.0, certain=1.5)
    """
    if not rounds:
        raise ValueError("measure returned no rounds -> return a list of (seconds dense, seconds sparse)")
    ratios = sorted(dense / sparse for dense, sparse in rounds)
    certain = ratios[max(0, int(len(ratios) / 2 - _NORMAL_99 * math.sqrt(len(ratios)) / 2))]
    dense, sparse = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return Timing(dense, sparse, statistics.median(ratios), certain)


def _seconds(way: Callable[[], Any], calls: int) -> float:
    clock = _clock()
    _wait()
    start = clock()
    for _ in range(calls):
        way()
    _wait()
    return (clock() - start) / calls


def _clock() -> Callable[[], float]:
    """Of one thread on the CPU its own time, which stands still while other programs have the processor."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return time.thread_time if alone else time.perf_counter


def _wait() -> None:
    """A GPU returns before it is done."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
