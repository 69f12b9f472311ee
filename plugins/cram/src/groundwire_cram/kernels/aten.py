"""The kernels out of stock ATen operations: nothing to compile, any device.

Tensors are worked on in pieces that stay in the processor's cache, so that temporaries cost no memory traffic.
``torch.add(w, g, alpha=scale)`` is not used: it fuses product and sum, and so differs from the published rule in the
last bit. ``hardshrink`` is exactly that rule, zero where ``|v| <= threshold``, and its derivative is the mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_cram.kernels import radix
from groundwire_cram.kernels.interface import Pattern, Selection, check_nm, check_ranks, gradients
from groundwire_cram.kernels.layout import channels_last, pieces

#: Entries of one piece on a CPU: four of them in f32 fill 2 MB.
PIECE = 1 << 17

#: Weights, each with its gradient.
Pairs = list[tuple[Tensor, Tensor | None]]


class Aten:
    """Stock ATen; see :class:`~groundwire_cram.kernels.interface.Kernels`.

    Example:
        >>> w, saved = [torch.tensor([[1.0, -2.0, 3.0]])], [torch.empty(1, 3)]
        >>> Aten().perturb(w, None, 0.0, threshold=1.0, saved=saved)
        >>> w, saved
        ([tensor([[ 0., -2.,  3.]])], [tensor([[ 1., -2.,  3.]])])
    """

    name = "aten"

    @torch.no_grad()
    def thresholds(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor | None] | None, scale: float, ranks: Sequence[int]
    ) -> Selection:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.thresholds`. Off the CPU it stores all magnitudes."""
        check_ranks(ranks, sum(w.numel() for w in weights))
        pairs = list(zip(weights, gradients(weights, grads), strict=True))
        if any(w.device.type != "cpu" or w.dtype == torch.float64 for w in weights):
            return _by_kthvalue(pairs, scale, ranks)
        return radix.select(ranks, high_counts(pairs, scale), partial(low_counts, pairs, scale))

    @torch.no_grad()
    def perturb(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        threshold: float | None,
        saved: Sequence[Tensor],
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.interface.Kernels.perturb`."""
        for tensors in zip(weights, gradients(weights, grads), saved, strict=True):
            for w, g, save in _pieces(*tensors):
                save.copy_(w)
                _move(save, g, scale, out=w)
                if threshold is not None:
                    torch.hardshrink(w, within(threshold, w.dtype), out=w)

    @torch.no_grad()
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
            w.masked_fill_(smallest(w, n, m), 0)

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
        for tensors in zip(weights, saved, gradients(weights, first), second, strict=True):
            if isinstance(pattern, tuple) and tensors[3] is not None:
                save_moved(*tensors[:3], scale)
                tensors[3].masked_fill_(smallest(tensors[0], *pattern), 0)
            for w, save, one, two in _pieces(*tensors):
                w.copy_(save)
                if two is not None and isinstance(pattern, float | int):
                    v = save if one is None else _move(save, one, scale, out=torch.empty_like(w))
                    limit = within(pattern, w.dtype)
                    torch.ops.aten.hardshrink_backward.grad_input(two, v, limit, grad_input=two)
                if two is not None and one is not None and plus:
                    two.add_(one)


def _pieces(*tensors: Tensor | None) -> Any:
    device = next(t.device for t in tensors if t is not None)
    return pieces(tensors, PIECE) if device.type == "cpu" else [tensors]


def _move(weight: Tensor, grad: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """``weight + scale * grad`` into ``out``, which may be ``weight``."""
    if grad is None:
        return out.copy_(weight)
    return torch.add(weight, grad * scale, out=out)


def save_moved(weight: Tensor, saved: Tensor, grad: Tensor | None, scale: float) -> None:
    """``weight <- saved + scale * grad``, for a weight that is restored afterwards."""
    for w, save, g in _pieces(weight, saved, grad):
        _move(save, g, scale, out=w)


def _by_kthvalue(pairs: Pairs, scale: float, ranks: Sequence[int]) -> Selection:
    magnitudes = torch.cat([torch.abs(w if g is None else w + g * scale).flatten() for w, g in pairs])
    finite = bool(magnitudes.isfinite().all())
    return Selection(tuple(magnitudes.kthvalue(m).values.item() if finite else math.nan for m in ranks), finite)


def _magnitude_bits(pairs: Pairs, scale: float) -> Iterator[Any]:
    """``|v|`` as f32 bits, piece by piece. NumPy's integer operations are several times faster than torch's."""
    for w, g in pairs:
        for w_piece, g_piece in _pieces(w.detach(), g):
            v = w_piece if g_piece is None else _move(w_piece, g_piece, scale, out=torch.empty_like(w_piece))
            yield v.float().abs().numpy().reshape(-1).view(np.int32)


def high_counts(pairs: Pairs, scale: float) -> radix.Counts:
    """How many magnitudes of ``w + scale * g`` have each upper half, for weights and gradients on the CPU."""
    counts = torch.zeros(radix.HIGH_BINS, dtype=torch.int64)
    for bits in _magnitude_bits(pairs, scale):
        counts += torch.bincount(torch.from_numpy(bits >> 16), minlength=radix.HIGH_BINS)
    return counts.numpy()


def low_counts(pairs: Pairs, scale: float, bins: list[int]) -> radix.Counts:
    """How many of those with each of the upper halves ``bins`` have each lower half."""
    found: dict[int, list[Any]] = {b: [np.empty(0, np.int32)] for b in bins}
    for bits in _magnitude_bits(pairs, scale):
        upper = bits >> 16
        for b, parts in found.items():
            parts.append(bits[np.flatnonzero(upper == b)] & 0xFFFF)
    counts = (np.bincount(np.concatenate(parts), minlength=radix.LOW_BINS) for parts in found.values())
    return np.stack(list(counts))


def within(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``threshold``: hardshrink would round to the nearest."""
    nearest = torch.tensor(threshold, dtype=dtype)
    if nearest.double() > threshold:
        nearest = torch.nextafter(nearest, torch.zeros_like(nearest))
    return nearest.item()


def smallest(v: Tensor, n: int, m: int) -> Tensor:
    """True for all but the n largest of each group, by counting for each entry how many of its group are smaller."""
    check_nm(v, n, m)
    last = channels_last(v)
    # NaN compares as false with everything, so the bits are compared: for magnitudes they are in the same order.
    members = _bits(last.abs()).reshape(-1, m).t().contiguous()
    ranks = torch.zeros(members.shape, dtype=torch.uint8, device=v.device)
    for earlier, later in itertools.combinations(range(m), 2):
        smaller = members[earlier] <= members[later]
        ranks[later] += smaller
        ranks[earlier] += ~smaller
    mask = (ranks < m - n).t().reshape(last.shape)
    return mask.movedim(-1, 1) if v.dim() > 2 else mask


def _bits(magnitudes: Tensor) -> Tensor:
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[magnitudes.element_size()]
    nan = torch.tensor(math.inf, dtype=magnitudes.dtype).view(dtype).item() + 1
    return magnitudes.contiguous().view(dtype).clamp_max(nan)
