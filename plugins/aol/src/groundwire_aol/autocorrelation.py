"""Sums of the absolute autocorrelation of a kernel, the expensive part of AOL, in two ways with equal results.

The plain way is one convolution of the kernel with itself. The fast way uses that ``v_ij(lag) = v_ji(-lag)``: half of
the
lags are enough, each is one matrix product, and the gradient has a closed form that needs the signs only.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

#: From this many scaled channels on, half the lags as matrix products are faster on a CPU (benchmarks/aol.py).
FAST_CHANNELS = 96
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
        sums: Tensor = _HalfLags.apply(blocks)[0]  # type: ignore[no-untyped-call]
        return sums
    return autocorrelation(blocks).abs().flatten(2).sum(2)


def _is_fast(blocks: Tensor) -> bool:
    if blocks.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    return blocks.shape[1] >= FAST_CHANNELS


def half_of_the_lags(taps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Zero, and of each pair of opposite lags one.

    Example:
        >>> half_of_the_lags((2, 2))
        [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    """
    return [lag for lag in itertools.product(*(range(1 - k, k) for k in taps)) if lag >= (0,) * len(taps)]


def _overlap(blocks: Tensor, lag: tuple[int, ...]) -> tuple[Any, Any]:
    """Index of the taps t that have a partner t + lag, and of these partners. ``blocks``: (g, c, taps..., r)."""
    first, second = [slice(None), slice(None)], [slice(None), slice(None)]
    for size, shift in zip(blocks.shape[2:-1], lag, strict=True):
        first.append(slice(max(0, -shift), size - max(0, shift)))
        second.append(slice(max(0, shift), size - max(0, -shift)))
    return tuple(first), tuple(second)


class _HalfLags(torch.autograd.Function):
    """Absolute sums from half of the lags. Its backward is differentiable too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks: Tensor) -> tuple[Tensor, Tensor]:
        last = blocks.movedim(2, -1).contiguous()
        sums = blocks.new_zeros(blocks.shape[:2])
        signs = []
        for lag in half_of_the_lags(tuple(blocks.shape[3:])):
            one, other = _overlap(last, lag)
            products = last[one].flatten(2) @ last[other].flatten(2).mT
            signs.append(products.sign().to(torch.int8))
            magnitudes = products.abs_()
            sums = sums + magnitudes.sum(2)
            if any(lag):
                sums = sums + magnitudes.sum(1)
        return sums, torch.stack(signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
        blocks, signs = ctx.saved_tensors
        last = blocks.movedim(2, -1).contiguous()
        # The pair (i, j) at a lag is also the pair (j, i) at the opposite one, so both sums feel it.
        both = grad.unsqueeze(2) + grad.unsqueeze(1)
        found = torch.zeros_like(last)
        for sign, lag in zip(signs, half_of_the_lags(tuple(blocks.shape[3:])), strict=True):
            one, other = _overlap(last, lag)
            outer = sign * both
            shape = last[one].shape
            found[one] = found[one] + (outer @ last[other].flatten(2)).reshape(shape)
            if any(lag):
                found[other] = found[other] + (outer.mT @ last[one].flatten(2)).reshape(shape)
        return found.movedim(-1, 2)
