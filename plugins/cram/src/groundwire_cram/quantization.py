"""Symmetric per-channel quantization, simulated in floating point."""

from __future__ import annotations

import torch
from torch import Tensor


def check_bits(bits: int) -> int:
    """``bits`` if it is a whole number from 2 to 8.

    Raises:
        ValueError: It is not.

    Example:
        >>> check_bits(4)
        4
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 2 to 8, got {bits!r}")
    return bits


def quantized(weight: Tensor, bits: int) -> Tensor:
    r"""The nearest values that ``bits``-bit integers with one scale per output channel can express.

    .. math:: q = s\,\mathrm{round}(w / s), \qquad s = \max|w| / (2^{bits-1} - 1)

    Args:
        weight: (O, ...); dimension 0 is that of the channels (embeddings: rows; transposed convolutions: inputs).
        bits: 2 to 8. The integers are symmetric, from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1``; 0 stays 0.

    Returns:
        The shape and dtype of ``weight``; computed in float32 (float64 for float64).

    Example:
        >>> quantized(torch.tensor([[0.0, 0.4, -1.4, 7.0]]), 4)
        tensor([[ 0.,  0., -1.,  7.]])
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    largest = 2 ** (check_bits(bits) - 1) - 1
    scale = wide.abs().amax(dim=tuple(range(1, wide.dim())), keepdim=True) / largest
    steps = torch.where(scale > 0, wide / scale, 0).round().clamp(-largest, largest)
    nearest: Tensor = steps * scale
    return nearest.to(weight.dtype)


def residual(weight: Tensor, bits: int) -> Tensor:
    """What has to be added to ``weight`` for :func:`quantized`.

    The sum is exact: a value and the grid point nearest to it are within a factor of two of each other or the grid
    point is 0, and then their difference is a floating-point number (Sterbenz' lemma).

    Example:
        >>> residual(torch.tensor([[0.5, -1.5, 7.0]]), 4)
        tensor([[-0.5000, -0.5000,  0.0000]])
    """
    return quantized(weight, bits) - weight.detach()
