"""The exact threshold: which weights magnitude pruning sets to zero.

The published rule prunes what is at or below the m-th largest of n magnitudes, ``m = ceil(n * (1 - sparsity))``.
:func:`published_threshold` says so in plain torch. In a training step the kernels find the same number without storing
a magnitude, by counting: :func:`from_histograms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def check_sparsity(sparsity: Any) -> float:
    """Return ``sparsity`` as a float, if it is a number in [0, 1).

    Raises:
        ValueError: It is not; for a percentage, the fraction is suggested.

    Example:
        >>> check_sparsity(0.9)
        0.9
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if number and 1 < sparsity < 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1), got {sparsity!r}{hint}")
    return float(sparsity)


def published_rank(n: int, sparsity: float) -> int | None:
    """Return the rank of the published threshold among ``n`` magnitudes, 1 for the smallest; None to prune nothing.

    Example:
        >>> published_rank(10, 0.9), published_rank(10, 0.0)
        (10, None)
    """
    if check_sparsity(sparsity) == 0 or n == 0:
        return None
    return n - math.ceil(n * (1 - sparsity)) + 1


def published_threshold(tensors: Iterable[Tensor], sparsity: float) -> Tensor | None:
    """Return the magnitude at or below which the published rule prunes.

    Args:
        tensors: All tensors that are pruned together, n entries in all.
        sparsity: Fraction in [0, 1).

    Returns:
        A scalar, or None if nothing is pruned (sparsity 0 or no entry).

    Example:
        >>> published_threshold([torch.tensor([1.0, -2.0, 3.0, -4.0])], 0.5)
        tensor(3.)
    """
    magnitudes = torch.cat([t.detach().abs().flatten() for t in tensors] or [torch.empty(0)])
    rank = published_rank(len(magnitudes), sparsity)
    return None if rank is None else magnitudes.kthvalue(rank).values


def published_masks(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return what the published rule keeps: entries strictly above the common threshold. bool, shapes of ``tensors``.

    Without ties it keeps one entry fewer than ``n * (1 - sparsity)``, as the authors' code does.

    Example:
        >>> published_masks({"w": torch.tensor([[1.0, -2.0], [3.0, -4.0]])}, 0.5)["w"].tolist()
        [[False, False], [False, True]]
    """
    threshold = published_threshold(tensors.values(), sparsity)
    if threshold is None:
        return {name: torch.ones_like(t, dtype=torch.bool) for name, t in tensors.items()}
    return {name: t.detach().abs() > threshold for name, t in tensors.items()}


def exact_masks(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return masks with exactly floor(sparsity * n) False entries in all; of equal magnitudes the first go first.

    Example:
        >>> exact_masks({"w": torch.ones(1, 4)}, 0.5)["w"].tolist()
        [[False, False, True, True]]
    """
    sizes = [t.numel() for t in tensors.values()]
    zeros = math.floor(check_sparsity(sparsity) * sum(sizes))
    magnitudes = torch.cat([t.detach().abs().flatten() for t in tensors.values()] or [torch.empty(0)])
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    if zeros:
        threshold = magnitudes.kthvalue(zeros).values
        ties = magnitudes == threshold
        below = magnitudes < threshold
        keep = ~(below | (ties & (ties.cumsum(0) <= zeros - below.sum())))
    parts = torch.split(keep, sizes)
    return {name: part.view_as(t) for part, (name, t) in zip(parts, tensors.items(), strict=True)}


#: Bins for the upper 16 bits of a magnitude in f32 (sign, which is 0, exponent and 7 bits of mantissa).
HIGH_BINS = 1 << 15
#: Bins for the lower 16 bits.
LOW_BINS = 1 << 16
#: High bins from here on hold what is not finite.
NOT_FINITE = 0x7F80

Histogram = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OrderStatistics:
    """Order statistics of magnitudes.

    Attributes:
        values: The m-th smallest magnitude for each rank m that was asked for; NaN if not ``finite``.
        finite: Whether every entry is a finite number.
    """

    values: tuple[float, ...]
    finite: bool


def from_histograms(ranks: Sequence[int], high: Histogram, low: Callable[[list[int]], Histogram]) -> OrderStatistics:
    """Find order statistics exactly by two histograms, a radix selection.

    Non-negative f32 numbers are in the order of their bits. So the upper half of the number sought comes from counts
    of upper halves, and its lower half from counts of the lower halves of those entries that share the upper one.
    Counts are integers: the result is the same in any order of counting, so for any number of threads and on every
    rank. bf16 and f16 numbers are f32 numbers too.

    Args:
        ranks: 1-based, in ascending order of magnitude, each at most the sum of ``high``.
        high: How many magnitudes have each upper half, HIGH_BINS counts.
        low: Given upper halves, the LOW_BINS counts of lower halves for each of them.

    Example:
        >>> high, low = np.zeros(HIGH_BINS, np.int64), np.zeros(LOW_BINS, np.int64)
        >>> high[0x3F80] = low[0] = 1  # the number 1.0
        >>> from_histograms([1], high, lambda bins: low[None])
        OrderStatistics(values=(1.0,), finite=True)
    """
    if high[NOT_FINITE:].any():
        return OrderStatistics((math.nan,) * len(ranks), False)
    places = [_bin_of(high, rank) for rank in ranks]
    bins = sorted({upper for upper, _ in places})
    lower = dict(zip(bins, low(bins), strict=True)) if bins else {}
    bits = (upper << 16 | _bin_of(lower[upper], rank)[0] for upper, rank in places)
    return OrderStatistics(tuple(float(np.uint32(b).view(np.float32)) for b in bits), True)


def _bin_of(histogram: Histogram, rank: int) -> tuple[int, int]:
    """Return the bin with the entry of this rank, and the entry's rank among those in the bin."""
    used = histogram.nonzero()[0]
    below = histogram[used].cumsum()
    at = below.searchsorted(rank)
    return int(used[at]), int(rank - below[at] + histogram[used[at]])
