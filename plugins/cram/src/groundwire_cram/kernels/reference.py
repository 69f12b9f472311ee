"""The definition of what the kernels compute, in plain torch: slow, and for any device and floating dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from groundwire_cram.kernels.base import Part, Pattern
from groundwire_cram.operators import nm_mask
from groundwire_cram.threshold import OrderStatistics


class Reference:
    """Plain torch with every temporary; see :class:`~groundwire_cram.kernels.base.Kernels`.

    Example:
        >>> part = Part([torch.tensor([[1.0, -2.0, 3.0]])], [torch.tensor([[1.0, 1.0, 1.0]])], 2.0)
        >>> Reference().thresholds(part, ranks=[1, 2])
        OrderStatistics(values=(0.0, 3.0), finite=True)
    """

    name = "reference"

    def thresholds(self, part: Part, ranks: Sequence[int]) -> OrderStatistics:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.thresholds`."""
        moves = [moved(w, g, part.scale) for w, g in part.pairs]
        magnitudes = torch.cat([v.detach().abs().flatten().double() for v in moves] or [torch.empty(0)])
        part.check_ranks(ranks)
        finite = bool(magnitudes.isfinite().all())
        return OrderStatistics(
            tuple(magnitudes.kthvalue(m).values.item() if finite else math.nan for m in ranks), finite
        )

    @torch.no_grad()
    def perturb(self, part: Part, pattern: Pattern, saved: Sequence[Tensor]) -> None:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.perturb`."""
        part.check_pattern(pattern)
        for (w, g), save in zip(part.pairs, saved, strict=True):
            v = moved(w, g, part.scale)
            v = v.masked_fill(pruned(v, pattern), 0)
            save.copy_(w)
            w.copy_(v)

    @torch.no_grad()
    def combine(
        self, part: Part, pattern: Pattern, saved: Sequence[Tensor], second: Sequence[Tensor | None], *, plus: bool
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.combine`."""
        for (w, one), save, two in zip(part.pairs, saved, second, strict=True):
            w.copy_(save)
            if two is not None:
                two.masked_fill_(pruned(moved(save, one, part.scale), pattern), 0)
                if plus and one is not None:
                    two.add_(one)


def moved(weight: Tensor, grad: Tensor | None, scale: float) -> Tensor:
    """Return ``weight + scale * grad``, the product rounded first.

    Example:
        >>> moved(torch.tensor([1.0]), torch.tensor([2.0]), 0.5)
        tensor([2.])
    """
    return weight if grad is None else weight + grad * scale


def pruned(v: Tensor, pattern: Pattern) -> Tensor:
    """Return True where ``pattern`` sets ``v`` to zero.

    Example:
        >>> pruned(torch.tensor([[1.0, -3.0, 1.0, 2.0]]), (2, 4))
        tensor([[ True, False,  True, False]])
        >>> pruned(torch.tensor([1.0, -3.0]), 1.0)
        tensor([ True, False])
    """
    if pattern is None:
        return torch.zeros_like(v, dtype=torch.bool)
    if not isinstance(pattern, tuple):
        return v.abs().double() <= pattern
    return ~nm_mask(v, *pattern)
