"""Order statistics of magnitudes from two histograms.

Non-negative f32 numbers are in the order of their bits, so the m-th smallest is found exactly by counting: first the
upper 16 bits (sign, which is 0, exponent and 7 bits of mantissa), then the lower 16 bits of those entries that share
the upper half of the number sought. Counts are integers: the result is the same in any order of counting, so for any
number of threads and on every rank. bf16 and f16 numbers are f32 numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from groundwire_cram.kernels.interface import Selection

HIGH_BINS = 1 << 15
LOW_BINS = 1 << 16
#: Bins from here on hold what is not finite.
NOT_FINITE = 0x7F80

Counts = npt.NDArray[np.int64]


def select(ranks: Sequence[int], high: Counts, low: Callable[[list[int]], Counts]) -> Selection:
    """The entries of ``ranks`` (1-based, ascending order of magnitude).

    Args:
        ranks: Each at least 1 and at most the sum of ``high``.
        high: How many magnitudes have each upper half, HIGH_BINS counts.
        low: Given upper halves, the LOW_BINS counts of lower halves for each of them.

    Example:
        >>> high, low = np.zeros(HIGH_BINS, np.int64), np.zeros(LOW_BINS, np.int64)
        >>> high[0x3F80] = low[0] = 1  # the number 1.0
        >>> select([1], high, lambda bins: low[None])
        Selection(values=(1.0,), finite=True)
    """
    if high[NOT_FINITE:].any():
        return Selection((math.nan,) * len(ranks), False)
    places = [_place(high, rank) for rank in ranks]
    bins = sorted({upper for upper, _ in places})
    lower = dict(zip(bins, low(bins), strict=True)) if bins else {}
    return Selection(tuple(_value(upper, _place(lower[upper], rank)[0]) for upper, rank in places), True)


def _place(counts: Counts, rank: int) -> tuple[int, int]:
    """The bin with the entry of this rank, and the entry's rank among those in the bin."""
    used = counts.nonzero()[0]
    below = counts[used].cumsum()
    at = below.searchsorted(rank)
    return int(used[at]), int(rank - below[at] + counts[used[at]])


def _value(upper: int, lower: int) -> float:
    return float(np.uint32(upper << 16 | lower).view(np.float32))
