"""Sums of the absolute autocorrelation of a kernel, the expensive part of AOL, in two ways with equal results.

The plain way is one convolution of the kernel with itself. The fast way uses that ``v_ij(lag) = v_ji(-lag)``: half of
the lags are enough, and the gradient has a closed form that needs their signs only: a product with a Toeplitz matrix
of them. Almost all the time is spent in BLAS.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from groundwire_aol.layers.toeplitz import MOST_TAPS, toeplitz_product

#: From this many scaled channels on, half the lags as matrix products are faster on a CPU (benchmarks/aol.py); from
#: fewer on with kernels whose gradient takes few products.
FAST_CHANNELS, FAST_CHANNELS_OF_FEW_TAPS = 96, 64
#: Products that are added in one sum.
_AT_A_TIME = 3
_CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


def autocorrelation(blocks: Tensor) -> Tensor:
    """``v_ij(lag) = sum_{r, t} Q_irt Q_jr(t + lag)`` for all lags.

    Args:
        blocks: Q of shape (groups, c, r, taps...), up to three axes of taps.

    Returns:
        Shape (groups, c, c, 2 * taps - 1...).

    Example:
        >>> autocorrelation(torch.ones(1, 1, 1, 3)).flatten().tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0]
    """
    groups, channels, _, *taps = blocks.shape
    if not taps:
        return blocks @ blocks.mT
    kernels = blocks.flatten(0, 1)
    signal = blocks.transpose(0, 1).flatten(1, 2)
    found = _CONVOLUTIONS[len(taps)](signal, kernels, padding=[k - 1 for k in taps], groups=groups)
    # The lags come in descending order; v_ij(lag) = v_ji(-lag), so neither sums nor the second step care.
    return found.unflatten(1, (groups, channels)).transpose(0, 1)  # type: ignore[no-any-return,no-untyped-call]


def lag_sums(blocks: Tensor) -> Tensor:
    """``s_i = sum_{j, lag} |v_ij(lag)|``, shape (groups, c); differentiable, with sign(0) = 0.

    Example:
        >>> lag_sums(torch.ones(1, 1, 1, 3))
        tensor([[9.]])
    """
    if _is_fast(blocks):
        sums: Tensor = _HalfLags.apply(blocks)  # type: ignore[no-untyped-call]
        return sums
    return plain_sums(blocks)


def plain_sums(blocks: Tensor) -> Tensor:
    """Return the same by one convolution; differentiable any number of times."""
    return autocorrelation(blocks).abs().flatten(2).sum(2)


def _is_fast(blocks: Tensor) -> bool:
    if blocks.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    least = FAST_CHANNELS_OF_FEW_TAPS if _has_points(tuple(blocks.shape[3:])) else FAST_CHANNELS
    return blocks.shape[1] >= least and not is_transformed(blocks)


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether ``tensor`` is a tracer's, of vmap, grad, export or a fake mode: its values cannot be looked at."""
    return type(tensor) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@cache
def half_of_the_lags(taps: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """For lag zero, and one of each two opposite lags: the pairs (t, t + lag) of taps, as flat indices.

    Example:
        >>> half_of_the_lags((3,))
        (((0, 0), (1, 1), (2, 2)), ((0, 1), (1, 2)), ((0, 2),))
    """
    index = {tap: i for i, tap in enumerate(itertools.product(*map(range, taps)))}
    pairs: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for tap, other in itertools.product(index, repeat=2):
        lag = tuple(b - a for a, b in zip(tap, other, strict=True))
        if lag >= (0,) * len(taps):
            pairs.setdefault(lag, []).append((index[tap], index[other]))
    return tuple(tuple(pairs[lag]) for lag in sorted(pairs))


def _taps_first(blocks: Tensor) -> Tensor:
    """(g, c, r, taps...) as (taps, g, c, r), copied by torch's fast transposition of a matrix."""
    swapped = blocks.stride(1) < blocks.stride(2)
    stored = blocks.transpose(1, 2) if swapped else blocks
    found = stored.reshape(stored.shape[:3].numel(), -1).t().contiguous().view(-1, *stored.shape[:3])
    return found.mT if swapped else found


def _taps_last(found: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_taps_first`."""
    swapped = found.stride(-1) > found.stride(-2)
    stored = found.mT if swapped else found
    blocks = stored.flatten(1).t().contiguous().view(*stored.shape[1:], *shape[3:])
    return blocks.transpose(1, 2) if swapped else blocks


class _HalfLags(torch.autograd.Function):
    """Absolute sums from half of the lags."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor) -> Tensor:
        taps = _taps_first(blocks).unbind()
        sums = blocks.new_zeros(blocks.shape[:2])
        signs = []
        for pairs in half_of_the_lags(tuple(blocks.shape[3:])):
            products = blocks.new_zeros(*sums.shape, sums.shape[1])
            for one, other in pairs:
                _add_product(products, taps[one], taps[other].mT)
            signs.append(products.sign().to(torch.int8))
            sums += products.abs_().sum(2)
            if pairs[0][0] != pairs[0][1]:
                sums += products.sum(1)
        ctx.save_for_backward(blocks, torch.stack(signs))
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        blocks, signs = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            twice: Tensor = torch.autograd.grad(plain_sums(blocks), blocks, grad, create_graph=True)[0]
            return twice
        # The pair (i, j) at a lag is also the pair (j, i) at the opposite one, so both sums feel it.
        both = grad.unsqueeze(2) + grad.unsqueeze(1)
        first, taps = _taps_first(blocks), tuple(blocks.shape[3:])
        derive = toeplitz_product if _has_points(taps) else _sum_of_products
        return _taps_last(derive(signs, both, first, taps), blocks.shape)


def _has_points(taps: tuple[int, ...]) -> bool:
    return 1 < max(taps, default=1) <= MOST_TAPS


def _sum_of_products(signs: Tensor, both: Tensor, blocks: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return what :func:`toeplitz_product` gives, one product for each pair of taps."""
    taps, found, part = blocks.unbind(), torch.zeros_like(blocks), torch.empty_like(blocks[0])
    partners: list[list[tuple[Tensor, int]]] = [[] for _ in taps]
    for sign, pairs in zip(signs, half_of_the_lags(sizes), strict=True):
        outer = sign * both
        for one, other in pairs:
            partners[one].append((outer, other))
            if one != other:
                partners[other].append((outer.mT, one))
    for total, needed in zip(found, partners, strict=True):
        # A few at a time: in one long sum, each term would be rounded to the size of the sum so far.
        for start in range(0, len(needed), _AT_A_TIME):
            part.zero_()
            for outer, other in needed[start : start + _AT_A_TIME]:
                _add_product(part, outer, taps[other])
            total += part
    return found


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """``total += one @ other``, in place, for one matrix or several."""
    if len(total) == 1:
        total[0].addmm_(one[0], other[0])
    else:
        total.baddbmm_(one, other)
