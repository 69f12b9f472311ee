"""Pooling, and other layers without weights, scaled so that their Lipschitz constant is exactly 1."""

from __future__ import annotations

import math

from torch import Tensor, nn


class Rescaled(nn.Module):
    """A layer without weights, times a constant that makes its Lipschitz constant exactly 1.

    Args:
        layer: For example ``nn.AvgPool2d(2)``, which has 1/2, or ``nn.MaxPool2d(3, 2)``, which has 2.
        factor: What to multiply by.

    Example:
        >>> import torch
        >>> Rescaled(nn.AvgPool1d(4), 2.0)(torch.ones(1, 1, 4))
        tensor([[[2.]]])
    """

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def extra_repr(self) -> str:
        """The factor."""
        return f"factor={self.factor:g}"

    def forward(self, x: Tensor) -> Tensor:
        """``factor * layer(x)``."""
        found: Tensor = self.layer(x) * self.factor
        return found


class GlobalAvgPool(nn.Module):
    """Sum over all positions divided by the root of their number: average pooling to 1 x 1 with norm exactly 1.

    Args:
        axes: Spatial dimensions behind the channels, which become of size 1.

    Example:
        >>> import torch
        >>> GlobalAvgPool(2)(torch.ones(1, 1, 2, 2))
        tensor([[[[2.]]]])
    """

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to (B, C, 1...)."""
        dims = list(range(-self.axes, 0))
        return x.sum(dims, keepdim=True) / math.sqrt(math.prod(x.shape[d] for d in dims))
