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

from groundwire_cram.kernels.base import Part, Pattern
from groundwire_cram.kernels.strides import channels_last, pieces
from groundwire_cram.operators import check_nm
from groundwire_cram.threshold import HIGH_BINS, LOW_BINS, Histogram, OrderStatistics, from_histograms

#: Entries of one piece on a CPU: four of them in f32 fill 2 MB.
PIECE = 1 << 17


class Aten:
    """Stock ATen; see :class:`~groundwire_cram.kernels.base.Kernels`.

    Example:
        >>> part, saved = Part([torch.tensor([[1.0, -2.0, 3.0]])], None, 0.0), [torch.empty(1, 3)]
        >>> Aten().perturb(part, 1.0, saved)
        >>> part.weights, saved
        ([tensor([[ 0., -2.,  3.]])], [tensor([[ 1., -2.,  3.]])])
    """

    name = "aten"

    @torch.no_grad()
    def thresholds(self, part: Part, ranks: Sequence[int]) -> OrderStatistics:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.thresholds`. Off the CPU it stores all magnitudes."""
        part.check_ranks(ranks)
        if any(w.device.type != "cpu" or w.dtype == torch.float64 for w in part.weights):
            return _by_kthvalue(part, ranks)
        return from_histograms(ranks, high_histogram(part), partial(low_histograms, part))

    @torch.no_grad()
    def perturb(self, part: Part, pattern: Pattern, saved: Sequence[Tensor]) -> None:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.perturb`."""
        part.check_pattern(pattern)
        for (weight, grad), copy in zip(part.pairs, saved, strict=True):
            for w, g, save in _pieces(weight, grad, copy):
                save.copy_(w)
                _move(save, g, part.scale, out=w)
                if isinstance(pattern, float | int):
                    torch.hardshrink(w, within(pattern, w.dtype), out=w)
            if isinstance(pattern, tuple):
                weight.masked_fill_(smallest(weight, *pattern), 0)

    @torch.no_grad()
    def combine(
        self, part: Part, pattern: Pattern, saved: Sequence[Tensor], second: Sequence[Tensor | None], *, plus: bool
    ) -> None:
        """See :meth:`~groundwire_cram.kernels.base.Kernels.combine`."""
        for (weight, first), copy, masked in zip(part.pairs, saved, second, strict=True):
            if isinstance(pattern, tuple) and masked is not None:
                save_moved(weight, copy, first, part.scale)
                masked.masked_fill_(smallest(weight, *pattern), 0)
            for w, save, one, two in _pieces(weight, copy, first, masked):
                w.copy_(save)
                if two is not None and isinstance(pattern, float | int):
                    v = save if one is None else _move(save, one, part.scale, out=torch.empty_like(w))
                    limit = within(pattern, w.dtype)
                    torch.ops.aten.hardshrink_backward.grad_input(two, v, limit, grad_input=two)
                if two is not None and one is not None and plus:
                    two.add_(one)


def _pieces(*tensors: Tensor | None) -> Any:
    device = next(t.device for t in tensors if t is not None)
    return pieces(tensors, PIECE) if device.type == "cpu" else [tensors]


def _move(weight: Tensor, grad: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """Write ``weight + scale * grad`` into ``out``, which may be ``weight``."""
    if grad is None:
        return out.copy_(weight)
    return torch.add(weight, grad * scale, out=out)


def save_moved(weight: Tensor, saved: Tensor, grad: Tensor | None, scale: float) -> None:
    """Set ``weight <- saved + scale * grad``, for a weight that is restored afterwards."""
    for w, save, g in _pieces(weight, saved, grad):
        _move(save, g, scale, out=w)


def _by_kthvalue(part: Part, ranks: Sequence[int]) -> OrderStatistics:
    magnitudes = torch.cat([torch.abs(w if g is None else w + g * part.scale).flatten() for w, g in part.pairs])
    finite = bool(magnitudes.isfinite().all())
    return OrderStatistics(tuple(magnitudes.kthvalue(m).values.item() if finite else math.nan for m in ranks), finite)


def _magnitude_bits(part: Part) -> Iterator[Any]:
    """Yield ``|v|`` as f32 bits, piece by piece. NumPy's integer operations are several times faster than torch's."""
    for w, g in part.pairs:
        for w_piece, g_piece in _pieces(w.detach(), g):
            v = w_piece if g_piece is None else _move(w_piece, g_piece, part.scale, out=torch.empty_like(w_piece))
            yield v.float().abs().numpy().reshape(-1).view(np.int32)


def high_histogram(part: Part) -> Histogram:
    """Count the upper halves of the magnitudes of a part on the CPU."""
    counts = torch.zeros(HIGH_BINS, dtype=torch.int64)
    for bits in _magnitude_bits(part):
        counts += torch.bincount(torch.from_numpy(bits >> 16), minlength=HIGH_BINS)
    return counts.numpy()


def low_histograms(part: Part, bins: list[int]) -> Histogram:
    """Count the lower halves of those with each of the upper halves ``bins``."""
    found: dict[int, list[Any]] = {b: [np.empty(0, np.int32)] for b in bins}
    for bits in _magnitude_bits(part):
        upper = bits >> 16
        for b, parts in found.items():
            parts.append(bits[np.flatnonzero(upper == b)] & 0xFFFF)
    counts = (np.bincount(np.concatenate(parts), minlength=LOW_BINS) for parts in found.values())
    return np.stack(list(counts))


def within(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number of ``dtype`` that is not above ``threshold``: hardshrink would round to the nearest."""
    nearest = torch.tensor(threshold, dtype=dtype)
    if nearest.double() > threshold:
        nearest = torch.nextafter(nearest, torch.zeros_like(nearest))
    return nearest.item()


def smallest(v: Tensor, n: int, m: int) -> Tensor:
    """Return True for all but the n largest of each group: for each entry, count the smaller of its group."""
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
