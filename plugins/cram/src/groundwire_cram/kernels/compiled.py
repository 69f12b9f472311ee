"""What backends with loops of their own have in common: which tensors the loops take, and what becomes of others.

Tensors that they cannot take (another dtype or device, no gradient, a layout with gaps or one that differs between a
weight and its gradient, a subclass) go through stock ATen, with the same result entry by entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from groundwire_cram.kernels import radix
from groundwire_cram.kernels.aten import Aten, save_moved, smallest, within
from groundwire_cram.kernels.interface import Pattern, Selection, check_nm, check_ranks, gradients
from groundwire_cram.kernels.layout import flat, groups_in_memory

#: A threshold that masks nothing.
_NONE = -1.0
#: Subclasses may keep their entries elsewhere.
_PLAIN = {Tensor, torch.nn.Parameter}

#: Tensors that belong together: a weight, its gradient and so on.
Together = tuple[Tensor, ...]


class Compiled(ABC):
    """The kernels in terms of loops over dense f32 or half precision tensors; a subclass has the loops.

    Attributes:
        dtypes: The dtypes that the loops take.
        devices: The types of device whose memory they can reach.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str]

    def __init__(self) -> None:
        self._aten = Aten()

    def thresholds(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor | None] | None, scale: float, ranks: Sequence[int]
    ) -> Selection:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.thresholds`."""
        if any(w.dtype == torch.float64 for w in weights):
            return self._aten.thresholds(weights, grads, scale, ranks)
        check_ranks(ranks, sum(w.numel() for w in weights))
        ours, others = self._sorted_out(zip(weights, gradients(weights, grads), strict=True))
        high = self._high(ours, scale)
        if others:
            high = high + self._other_high(others, scale)
        return radix.select(ranks, high, partial(self._all_low, ours, others, scale))

    def perturb(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        threshold: float | None,
        saved: Sequence[Tensor],
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.perturb`."""
        ours, others = self._sorted_out(zip(weights, gradients(weights, grads), saved, strict=True))
        self._perturb(ours, scale, _limit(threshold))
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
        for w in weights:
            self._mask(w, w, n, m)

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
            self._mask_second(zip(weights, saved, first, second, strict=True), scale, *pattern)
            pattern = None
        ours, others = self._sorted_out(zip(weights, saved, first, second, strict=True))
        self._combine(ours, scale, _limit(pattern), plus)
        for w, save, one, two in others:
            self._aten.combine([w], [save], [one], [two], scale, pattern, plus=plus)
        increment_version([*weights, *(two for two in second if two is not None)])

    def _mask_second(self, tensors: Iterable[Any], scale: float, n: int, m: int) -> None:
        """Zeros in second gradients; weights, restored afterwards, serve as memory for the moved ones."""
        with torch.no_grad():
            for w, save, one, two in tensors:
                if two is not None:
                    save_moved(w, save, one, scale)
                    self._mask(w, two, n, m)

    def _mask(self, v: Tensor, target: Tensor, n: int, m: int) -> None:
        geometry = groups_in_memory(v)
        if geometry is None or not self._takes((v, target)):
            target.detach().masked_fill_(smallest(v.detach(), n, m), 0)
        elif v.numel():
            self._mask_groups(v, target, *geometry, n, m)

    def _all_low(self, ours: list[Together], others: list[Any], scale: float, bins: list[int]) -> radix.Counts:
        counts = self._low(ours, scale, bins)
        return counts + self._other_low(others, scale, bins) if others else counts

    def _sorted_out(self, tensors: Iterable[tuple[Tensor | None, ...]]) -> tuple[list[Any], list[Any]]:
        """Those that the loops take, and the others."""
        ours: list[Any] = []
        others: list[Any] = []
        for together in tensors:
            (ours if self._takes(together) else others).append(together)
        return ours, others

    def _takes(self, tensors: tuple[Tensor | None, ...]) -> bool:
        weight: Any = tensors[0]
        t: Any
        dtype, size, on_cpu = weight.dtype, weight.numel(), weight.is_cpu
        contiguous = True
        for t in tensors:
            if type(t) not in _PLAIN or t.dtype is not dtype or t.is_cpu is not on_cpu or _unwritten(t):
                return False
            if t.numel() != size:
                raise ValueError(f"a tensor of {t.numel()} entries goes with a weight of {size}; they must match")
            contiguous = contiguous and t.is_contiguous()
        return dtype in self.dtypes and weight.device.type in self.devices and (contiguous or flat(tensors) is not None)

    @abstractmethod
    def _high(self, ours: list[Together], scale: float) -> radix.Counts:
        """How many of the magnitudes of w, g have each upper half."""

    @abstractmethod
    def _low(self, ours: list[Together], scale: float, bins: list[int]) -> radix.Counts:
        """How many with each of these upper halves have each lower half."""

    @abstractmethod
    def _other_high(self, others: list[Any], scale: float) -> radix.Counts:
        """As ``_high``, for what the loops do not take."""

    @abstractmethod
    def _other_low(self, others: list[Any], scale: float, bins: list[int]) -> radix.Counts:
        """As ``_low``, for what the loops do not take."""

    @abstractmethod
    def _perturb(self, ours: list[Together], scale: float, threshold: float) -> None:
        """For w, g, saved."""

    @abstractmethod
    def _combine(self, ours: list[Together], scale: float, threshold: float, plus: bool) -> None:
        """For w, saved, first, second."""

    @abstractmethod
    def _mask_groups(self, v: Tensor, target: Tensor, channels: int, positions: int, n: int, m: int) -> None:
        """Zeros in ``target`` at all but the n largest of each group of m in ``v``."""


def _unwritten(t: Tensor) -> bool:
    """Whether memory does not hold the entries: sparse, lazily negated, or zeros that autograd never wrote down."""
    return t.layout is not torch.strided or t.is_neg() or t._is_zerotensor()


def _limit(threshold: float | None) -> float:
    return _NONE if threshold is None else within(threshold, torch.float32)
