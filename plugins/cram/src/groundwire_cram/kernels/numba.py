"""The kernels compiled by Numba, for f32 and bf16 on a CPU.

Each reads its inputs once and writes its outputs once. Other tensors (f16, f64, no gradient, layouts with gaps or that
differ between a weight and its gradient) go through stock ATen, entry by entry the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from groundwire_cram.kernels import loops, radix
from groundwire_cram.kernels.aten import Aten, high_counts, low_counts, save_moved, smallest, within
from groundwire_cram.kernels.interface import Pattern, Selection, check_nm, check_ranks, gradients
from groundwire_cram.kernels.layout import flat, groups_in_memory
from groundwire_cram.kernels.threads import cut, in_parallel

#: A threshold that masks nothing.
_NONE = np.float32(-1)
#: What the loops can work on, each with an entry as they see it.
_LIKE: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
#: Subclasses may keep their entries elsewhere.
_PLAIN = {Tensor, torch.nn.Parameter}

_Tensors = tuple[Tensor | None, ...]
#: For each dtype the rows of a table.
_Rows = dict[torch.dtype, list[tuple[int, ...]]]


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
        rows, others = _rows(zip(weights, gradients(weights, grads), strict=True))
        s = np.float32(scale)
        high = _counted(partial(loops.count_high, scale=s), rows, radix.HIGH_BINS)

        def low(bins: list[int]) -> radix.Counts:
            loop = partial(loops.count_low, scale=s, uppers=np.array(bins, np.uint32))
            return _counted(loop, rows, (len(bins), radix.LOW_BINS)) + low_counts(others, scale, bins)

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
        rows, others = _rows(zip(weights, gradients(weights, grads), saved, strict=True))
        _run(partial(loops.perturb, scale=np.float32(scale), threshold=_limit(threshold)), rows)
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
        rows, others = _rows(zip(weights, saved, first, second, strict=True))
        _run(partial(loops.combine, scale=np.float32(scale), threshold=_limit(pattern), plus=plus), rows)
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
            row, geometry = _row((v, target)), groups_in_memory(v)
            if row is None or geometry is None:
                target.detach().masked_fill_(smallest(v.detach(), n, m), 0)
                continue
            tables = [
                np.array([(*row[:2], *geometry, start, stop - start) for _, start, stop in part], np.int64)
                for part in cut([row[-1] // m], m)
            ]
            in_parallel(lambda table, like=_LIKE[v.dtype]: loops.mask_groups(table, like, n, m), tables)


def _rows(tensors: Iterable[_Tensors]) -> tuple[_Rows, list[Any]]:
    """Of those that the loops can work on the addresses and sizes, and the others as they are."""
    rows: _Rows = {}
    others = []
    for together in tensors:
        row = _row(together)
        if row is None:
            others.append(together)
        elif row[-1]:
            rows.setdefault(together[0].dtype, []).append(row)  # type: ignore[union-attr]
    return rows, others


def _row(tensors: _Tensors) -> tuple[int, ...] | None:
    weight = tensors[0]
    dtype, size = weight.dtype, weight.numel()  # type: ignore[union-attr]
    contiguous = True
    for t in tensors:
        if type(t) not in _PLAIN or t.dtype is not dtype or not t.is_cpu or t.layout is not torch.strided or t.is_neg():
            return None
        if t.numel() != size:
            raise ValueError(f"a tensor of {t.numel()} entries goes with a weight of {size}; they must match")
        contiguous = contiguous and t.is_contiguous()
    if dtype not in _LIKE or not (contiguous or flat(tensors)):
        return None
    addresses = [t.data_ptr() for t in tensors]
    # Zeros that autograd never wrote down have no address.
    return (*addresses, size) if all(addresses) or not size else None


def _limit(threshold: float | None) -> Any:
    return _NONE if threshold is None else np.float32(within(threshold, torch.float32))


def _tables(rows: _Rows) -> list[tuple[Any, Any]]:
    """For each thread a table, and the type of its entries; tensors are cut where one is too large for a thread."""
    tables = []
    for dtype, of_dtype in rows.items():
        for part in cut([row[-1] for row in of_dtype]):
            table = [
                (*(address + start * dtype.itemsize for address in of_dtype[index][:-1]), stop - start)
                for index, start, stop in part
            ]
            tables.append((np.array(table, np.int64), _LIKE[dtype]))
    return tables


def _run(loop: Callable[..., None], rows: _Rows) -> None:
    in_parallel(lambda table: loop(*table), _tables(rows))


def _counted(loop: Callable[..., None], rows: _Rows, shape: Any) -> radix.Counts:
    """The sum of what ``loop`` adds to counts of that shape."""

    def work(table: tuple[Any, Any]) -> Any:
        counts = np.zeros(shape, np.uint32)
        loop(*table, counts=counts)
        return counts

    return sum(in_parallel(work, _tables(rows)), np.zeros(shape, np.int64))
