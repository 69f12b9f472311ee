"""Base of the backends with compiled loops, Numba and Triton: which tensors the loops take, and the way of others.

Tensors that they cannot take (another dtype or device, no gradient, a layout with gaps or one that differs between a
weight and its gradient, a subclass) go through stock ATen, with the same result entry by entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from groundwire_cram.kernels.aten import Aten, save_moved, smallest, within
from groundwire_cram.kernels.base import Part, Pattern
from groundwire_cram.kernels.strides import flat, groups_in_memory
from groundwire_cram.threshold import Histogram, OrderStatistics, from_histograms

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

    def thresholds(self, part: Part, ranks: Sequence[int]) -> OrderStatistics:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.thresholds`."""
        if any(w.dtype == torch.float64 for w in part.weights):
            return self._aten.thresholds(part, ranks)
        part.check_ranks(ranks)
        ours, rest = self._divided(part.pairs)
        others = Part([w for w, _ in rest], [g for _, g in rest], part.scale)

        def low(bins: list[int]) -> Histogram:
            counts = self._low(ours, part.scale, bins)
            return counts + self._other_low(others, bins) if rest else counts

        high = self._high(ours, part.scale)
        return from_histograms(ranks, high + self._other_high(others) if rest else high, low)

    def perturb(self, part: Part, pattern: Pattern, saved: Sequence[Tensor]) -> None:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.perturb`."""
        part.check_pattern(pattern)
        threshold = None if isinstance(pattern, tuple) else pattern
        ours, others = self._divided((w, g, save) for (w, g), save in zip(part.pairs, saved, strict=True))
        self._perturb(ours, part.scale, _limit(threshold))
        for w, g, save in others:
            self._aten.perturb(Part([w], [g], part.scale), threshold, [save])
        if isinstance(pattern, tuple):
            for w in part.weights:
                self._mask(w, w, *pattern)
        increment_version(part.weights)

    def combine(
        self, part: Part, pattern: Pattern, saved: Sequence[Tensor], second: Sequence[Tensor | None], *, plus: bool
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.combine`."""
        tensors = [(w, save, one, two) for (w, one), save, two in zip(part.pairs, saved, second, strict=True)]
        if isinstance(pattern, tuple):
            with torch.no_grad():
                for w, save, one, two in tensors:
                    if two is not None:  # Weights, restored below, serve as memory for the moved ones.
                        save_moved(w, save, one, part.scale)
                        self._mask(w, two, *pattern)
        threshold = None if isinstance(pattern, tuple) else pattern
        ours, others = self._divided(tensors)
        self._combine(ours, part.scale, _limit(threshold), plus)
        for w, save, one, two in others:
            self._aten.combine(Part([w], [one], part.scale), threshold, [save], [two], plus=plus)
        increment_version([*part.weights, *(two for two in second if two is not None)])

    def _mask(self, v: Tensor, target: Tensor, n: int, m: int) -> None:
        geometry = groups_in_memory(v)
        if geometry is None or not self._takes((v, target)):
            target.detach().masked_fill_(smallest(v.detach(), n, m), 0)
        elif v.numel():
            self._mask_groups(v, target, *geometry, n, m)

    def _divided(self, tensors: Iterable[tuple[Tensor | None, ...]]) -> tuple[list[Any], list[Any]]:
        """Divide into those that the loops take, and the others."""
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
    def _high(self, ours: list[Together], scale: float) -> Histogram:
        """Count the upper halves of the magnitudes of w, g."""

    @abstractmethod
    def _low(self, ours: list[Together], scale: float, bins: list[int]) -> Histogram:
        """Count the lower halves of those with each of these upper halves."""

    @abstractmethod
    def _other_high(self, others: Part) -> Histogram:
        """Count as ``_high`` does, for what the loops do not take."""

    @abstractmethod
    def _other_low(self, others: Part, bins: list[int]) -> Histogram:
        """Count as ``_low`` does, for what the loops do not take."""

    @abstractmethod
    def _perturb(self, ours: list[Together], scale: float, threshold: float) -> None:
        """Move and mask: w, g, saved."""

    @abstractmethod
    def _combine(self, ours: list[Together], scale: float, threshold: float, plus: bool) -> None:
        """Restore, mask and add: w, saved, first, second."""

    @abstractmethod
    def _mask_groups(self, v: Tensor, target: Tensor, channels: int, positions: int, n: int, m: int) -> None:
        """Set zeros in ``target`` at all but the n largest of each group of m in ``v``."""


def _unwritten(t: Tensor) -> bool:
    """Return whether memory lacks the entries: sparse, lazily negated, or zeros that autograd never wrote down."""
    return t.layout is not torch.strided or t.is_neg() or t._is_zerotensor()


def _limit(threshold: float | None) -> float:
    return _NONE if threshold is None else within(threshold, torch.float32)
