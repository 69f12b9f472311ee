"""The definition of what the kernels compute, in plain torch: slow, and for any device and floating dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from groundwire_cram.kernels.interface import Pattern, Selection, check_nm, check_ranks, gradients


class Reference:
    """Plain torch with every temporary; see :class:`~groundwire_cram.kernels.interface.Kernels`.

    Example:
        >>> w, g = [torch.tensor([[1.0, -2.0, 3.0]])], [torch.tensor([[1.0, 1.0, 1.0]])]
        >>> Reference().thresholds(w, g, 2.0, ranks=[1, 2])
        Selection(values=(0.0, 3.0), finite=True)
    """

    name = "reference"

    def thresholds(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor | None] | None, scale: float, ranks: Sequence[int]
    ) -> Selection:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.thresholds`."""
        moves = (moved(w, g, scale) for w, g in zip(weights, gradients(weights, grads), strict=True))
        magnitudes = torch.cat([v.detach().abs().flatten().double() for v in moves] or [torch.empty(0)])
        check_ranks(ranks, len(magnitudes))
        finite = bool(magnitudes.isfinite().all())
        return Selection(tuple(magnitudes.kthvalue(m).values.item() if finite else math.nan for m in ranks), finite)

    def perturb(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        threshold: float | None,
        saved: Sequence[Tensor],
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.perturb`."""
        self._perturb(weights, grads, scale, threshold, saved)

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
        self._perturb(weights, grads, scale, (n, m), saved)

    @torch.no_grad()
    def _perturb(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        pattern: Pattern,
        saved: Sequence[Tensor],
    ) -> None:
        if isinstance(pattern, tuple):
            for w in weights:
                check_nm(w, *pattern)
        for w, g, save in zip(weights, gradients(weights, grads), saved, strict=True):
            v = moved(w, g, scale)
            v = v.masked_fill(pruned(v, pattern), 0)
            save.copy_(w)
            w.copy_(v)

    @torch.no_grad()
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
        for w, save, one, two in zip(weights, saved, gradients(weights, first), second, strict=True):
            w.copy_(save)
            if two is not None:
                two.masked_fill_(pruned(moved(save, one, scale), pattern), 0)
                if plus and one is not None:
                    two.add_(one)


def moved(weight: Tensor, grad: Tensor | None, scale: float) -> Tensor:
    """``weight + scale * grad``, the product rounded first.

    Example:
        >>> moved(torch.tensor([1.0]), torch.tensor([2.0]), 0.5)
        tensor([2.])
    """
    return weight if grad is None else weight + grad * scale


def pruned(v: Tensor, pattern: Pattern) -> Tensor:
    """True where ``pattern`` sets ``v`` to zero.

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
    n, m = pattern
    check_nm(v, n, m)
    last = v.movedim(1, -1)
    smallest = last.abs().reshape(-1, m).sort(dim=1, stable=True).indices[:, : m - n]
    mask = torch.zeros(last.numel() // m, m, dtype=torch.bool, device=v.device).scatter_(1, smallest, True)
    return mask.view(last.shape).movedim(-1, 1)
