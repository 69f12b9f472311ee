"""The kernels compiled by Numba, for f32 and bf16 on a CPU.

Each reads its inputs once and writes its outputs once. Other tensors (f16, f64, no gradient, layouts with gaps or that
differ between a weight and its gradient) go through stock ATen, entry by entry the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from groundwire_cram.kernels import loops, radix
from groundwire_cram.kernels.aten import Aten, high_counts, low_counts, save_moved, smallest, within
from groundwire_cram.kernels.interface import Pattern, Selection, check_nm, check_ranks, gradients
from groundwire_cram.kernels.layout import flat, groups_in_memory
from groundwire_cram.kernels.threads import Slice, cut, in_parallel

#: A threshold that masks nothing.
_NONE = np.float32(-1)

_Tensors = tuple[Tensor | None, ...]
_Arrays = list[tuple[Any, ...]]


class Numba:
    """Compiled loops; see :class:`~groundwire_cram.kernels.interface.Kernels`.

    Example:
        >>> w, g = [torch.tensor([[1.0, -2.0, 3.0]])], [torch.tensor([[1.0, 1.0, 1.0]])]
        >>> Numba().thresholds(w, g, 2.0, ranks=[1, 2])
        Selection(values=(0.0, 3.0), finite=True)
    """

    name = "numba"

    def __init__(self) -> None:
        self._aten = Aten()

    def thresholds(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor | None] | None, scale: float, ranks: Sequence[int]
    ) -> Selection:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.thresholds`."""
        if any(w.dtype == torch.float64 for w in weights):
            return self._aten.thresholds(weights, grads, scale, ranks)
        check_ranks(ranks, sum(w.numel() for w in weights))
        arrays, others = _arrays(zip(weights, gradients(weights, grads), strict=True))
        s = np.float32(scale)
        high = _counted(lambda w, g, counts: loops.count_high(w, g, s, counts), arrays, radix.HIGH_BINS)

        def low(bins: list[int]) -> radix.Counts:
            uppers, shape = np.array(bins, np.uint32), (len(bins), radix.LOW_BINS)
            counts = _counted(lambda w, g, counts: loops.count_low(w, g, s, uppers, counts), arrays, shape)
            return counts + low_counts(others, scale, bins)

        return radix.select(ranks, high + high_counts(others, scale), low)

    def perturb(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        threshold: float | None,
        saved: Sequence[Tensor],
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.perturb`."""
        arrays, others = _arrays(zip(weights, gradients(weights, grads), saved, strict=True))
        s, limit = np.float32(scale), _limit(threshold)
        _run(lambda w, g, save: loops.perturb(w, g, s, limit, save), arrays)
        for w, g, save in others:
            self._aten.perturb([w], [g], scale, threshold, [save])
        increment_version(weights)

    def perturb_nm(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        n: int,
        m: int,
        saved: Sequence[Tensor],
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.perturb_nm`."""
        for w in weights:
            check_nm(w, n, m)
        self.perturb(weights, grads, scale, None, saved)
        self._mask_groups(weights, weights, n, m)

    def combine(
        self,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        first: Sequence[Tensor | None] | None,
        second: Sequence[Tensor | None],
        scale: float,
        pattern: Pattern,
        *,
        plus: bool,
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.combine`."""
        first = gradients(weights, first)
        if isinstance(pattern, tuple):
            self._mask_second(weights, saved, first, second, scale, *pattern)
            pattern = None
        arrays, others = _arrays(zip(weights, saved, first, second, strict=True))
        s, limit = np.float32(scale), _limit(pattern)
        _run(lambda w, save, one, two: loops.combine(w, save, one, two, s, limit, plus), arrays)
        for w, save, one, two in others:
            self._aten.combine([w], [save], [one], [two], scale, pattern, plus=plus)
        increment_version([*weights, *(two for two in second if two is not None)])

    def _mask_second(
        self,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        first: Sequence[Tensor | None],
        second: Sequence[Tensor | None],
        scale: float,
        n: int,
        m: int,
    ) -> None:
        """Zeros in ``second``; uses the weights, which are restored afterwards, as memory for the moved ones."""
        reached = [i for i, two in enumerate(second) if two is not None]
        with torch.no_grad():
            for i in reached:
                save_moved(weights[i], saved[i], first[i], scale)
        self._mask_groups([weights[i] for i in reached], [two for two in second if two is not None], n, m)

    def _mask_groups(self, moved: Sequence[Tensor], targets: Sequence[Tensor], n: int, m: int) -> None:
        """Zeros in ``targets`` at all but the n largest of each group of m in ``moved``."""
        for v, target in zip(moved, targets, strict=True):
            arrays, others = _arrays([(v, target)])
            geometry = groups_in_memory(v)
            if others or geometry is None:
                target.detach().masked_fill_(smallest(v.detach(), n, m), 0)
                continue
            for flat_v, flat_target in arrays:
                _run_groups(flat_v, flat_target, geometry, n, m)


def _arrays(tensors: Iterable[_Tensors]) -> tuple[_Arrays, list[Any]]:
    """As flat arrays those that the loops can work on, and the others as they are."""
    arrays, others = [], []
    for together in tensors:
        views = _flat_arrays(together)
        others.append(together) if views is None else arrays.append(views)
    return arrays, others


def _flat_arrays(tensors: _Tensors) -> tuple[Any, ...] | None:
    kinds = {None if t is None else (t.dtype, t.device.type) for t in tensors}
    if kinds not in ({(torch.float32, "cpu")}, {(torch.bfloat16, "cpu")}):
        return None
    views = flat([t if t is None else t.detach() for t in tensors])
    if views is None:
        return None
    # NumPy has no bf16.
    return tuple((v.view(torch.uint16) if v.dtype == torch.bfloat16 else v).numpy() for v in views if v is not None)


def _limit(threshold: float | None) -> Any:
    return _NONE if threshold is None else np.float32(within(threshold, torch.float32))


def _slices(arrays: _Arrays, part: list[Slice]) -> Iterator[tuple[Any, ...]]:
    for index, start, stop in part:
        yield tuple(array[start:stop] for array in arrays[index])


def _run(loop: Callable[..., None], arrays: _Arrays) -> None:
    def work(part: list[Slice]) -> None:
        for pieces in _slices(arrays, part):
            loop(*pieces)

    in_parallel(work, cut([len(a[0]) for a in arrays]))


def _counted(loop: Callable[..., None], arrays: _Arrays, shape: Any) -> radix.Counts:
    """The sum of what ``loop`` adds to counts of that shape."""

    def work(part: list[Slice]) -> Any:
        counts = np.zeros(shape, np.uint32)
        for pieces in _slices(arrays, part):
            loop(*pieces, counts)
        return counts

    return sum(in_parallel(work, cut([len(a[0]) for a in arrays])), np.zeros(shape, np.int64))


def _run_groups(v: Any, target: Any, geometry: tuple[int, int], n: int, m: int) -> None:
    def work(part: list[Slice]) -> None:
        for _, start, stop in part:
            loops.mask_groups(v, target, *geometry, n, m, start, stop)

    in_parallel(work, cut([len(v) // m], m))
