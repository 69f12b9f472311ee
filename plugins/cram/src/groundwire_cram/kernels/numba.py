"""The kernels compiled by Numba, for f32 and bf16 on a CPU: inputs are read once and outputs written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_cram.kernels import numba_kernels
from groundwire_cram.kernels.aten import high_histogram, low_histograms
from groundwire_cram.kernels.base import Part
from groundwire_cram.kernels.compiled import Compiled, Together
from groundwire_cram.kernels.threads import cut, in_parallel
from groundwire_cram.threshold import HIGH_BINS, LOW_BINS, Histogram

#: For each dtype an entry as the loops see it.
_LIKE: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}


class Numba(Compiled):
    """Compiled loops; see :class:`~groundwire_cram.kernels.base.Kernels`.

    Example:
        >>> part = Part([torch.tensor([[1.0, -2.0, 3.0]])], [torch.tensor([[1.0, 1.0, 1.0]])], 2.0)
        >>> Numba().thresholds(part, ranks=[1, 2])
        OrderStatistics(values=(0.0, 3.0), finite=True)
    """

    name = "numba"
    dtypes = frozenset(_LIKE)
    devices = frozenset({"cpu"})

    def _high(self, ours: list[Together], scale: float) -> Histogram:
        return _counted(partial(numba_kernels.count_high, scale=np.float32(scale)), ours, HIGH_BINS)

    def _low(self, ours: list[Together], scale: float, bins: list[int]) -> Histogram:
        loop = partial(numba_kernels.count_low, scale=np.float32(scale), uppers=np.array(bins, np.uint32))
        return _counted(loop, ours, (len(bins), LOW_BINS))

    def _other_high(self, others: Part) -> Histogram:
        return high_histogram(others)

    def _other_low(self, others: Part, bins: list[int]) -> Histogram:
        return low_histograms(others, bins)

    def _perturb(self, ours: list[Together], scale: float, threshold: float) -> None:
        _run(partial(numba_kernels.perturb, scale=np.float32(scale), threshold=np.float32(threshold)), ours)

    def _combine(self, ours: list[Together], scale: float, threshold: float, plus: bool) -> None:
        _run(partial(numba_kernels.combine, scale=np.float32(scale), threshold=np.float32(threshold), plus=plus), ours)

    def _mask_groups(self, v: Tensor, target: Tensor, channels: int, positions: int, n: int, m: int) -> None:
        fixed = (v.data_ptr(), target.data_ptr(), channels, positions)
        tables = [
            np.array([(*fixed, start, stop - start) for _, start, stop in part], np.int64)
            for part in cut([v.numel() // m], m)
        ]
        in_parallel(partial(numba_kernels.mask_groups, like=_LIKE[v.dtype], n=n, m=m), tables)


def _tables(tensors: Sequence[Together]) -> list[tuple[Any, Any]]:
    """Return for each thread a table, and the type of its entries; a tensor too large for a thread is cut."""
    of_dtype: dict[torch.dtype, list[tuple[int, ...]]] = {}
    for together in tensors:
        row = (*[t.data_ptr() for t in together], together[0].numel())
        of_dtype.setdefault(together[0].dtype, []).append(row)
    return [
        (_table(rows, dtype.itemsize, part), _LIKE[dtype])
        for dtype, rows in of_dtype.items()
        for part in cut([row[-1] for row in rows])
    ]


def _table(rows: list[tuple[int, ...]], itemsize: int, part: list[tuple[int, int, int]]) -> Any:
    return np.array(
        [(*(a + start * itemsize for a in rows[index][:-1]), stop - start) for index, start, stop in part], np.int64
    )


def _run(loop: Callable[..., None], tensors: Sequence[Together]) -> None:
    in_parallel(lambda table: loop(*table), _tables(tensors))


def _counted(loop: Callable[..., None], tensors: Sequence[Together], shape: Any) -> Histogram:
    """Sum what ``loop`` adds to counts of that shape."""

    def work(table: tuple[Any, Any]) -> Any:
        counts = np.zeros(shape, np.uint32)
        loop(*table, counts=counts)
        return counts

    counts = in_parallel(work, _tables(tensors)) or [np.zeros(shape, np.uint32)]
    return counts[0].astype(np.int64) if len(counts) == 1 else sum(counts, np.zeros(shape, np.int64))
