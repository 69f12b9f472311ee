"""What takes the place of normalisation in a 1-Lipschitz model: centering without division, and fixed factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class BatchCentering(nn.Module):
    """Subtracts each channel's mean and adds a learned bias: BatchNorm without the division, 1-Lipschitz in evaluation.

    Training subtracts the mean of the batch and keeps a running one; evaluation subtracts the running one, a constant.

    Args:
        num_features: Channels, in dimension 1.
        momentum: Share of the newest batch in the running mean.
        bias: Whether to learn a bias.

    Shape:
        (B, C, ...) to the same.

    Example:
        >>> layer = BatchCentering(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[ -1., -10.],
                [  1.,  10.]], grad_fn=<AddBackward0>)
    """

    groundwire_aol: Tensor
    running_mean: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, bias: bool = True) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("groundwire_aol", torch.empty(0))
        self.register_load_state_dict_pre_hook(_take_batchnorm)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_features}, momentum={self.momentum}"

    def forward(self, x: Tensor) -> Tensor:
        """Centre ``x``."""
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        mean = self.running_mean.to(x.dtype)
        if self.training:
            mean = x.mean([d for d in range(x.dim()) if d != 1])
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        centred = x - mean.view(shape)
        return centred if self.bias is None else centred + self.bias.view(shape).to(x.dtype)


def _take_batchnorm(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint of a BatchNorm layer load: its mean and bias."""
    mark = f"{prefix}groundwire_aol"
    if f"{prefix}running_var" in state and mark not in state:
        for name in ("weight", "running_var", "num_batches_tracked"):
            state.pop(f"{prefix}{name}", None)
        if module.bias is None:
            state.pop(f"{prefix}bias", None)  # type: ignore[unreachable]
        elif f"{prefix}bias" not in state:
            state[f"{prefix}bias"] = module.bias.detach()  # type: ignore[operator]
        state[mark] = torch.empty(0)


class Rescaled(nn.Module):
    """A layer without weights, times a constant that makes its Lipschitz constant exactly 1.

    Args:
        layer: For example ``nn.AvgPool2d(2)``, which has 1/2, or ``nn.MaxPool2d(3, 2)``, which has 2.
        factor: What to multiply by.

    Example:
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


class ConvexSum(nn.Module):
    """``a x + (1 - a) f`` with a learned a in (0, 1): a residual connection that stays 1-Lipschitz.

    Example:
        >>> ConvexSum()(torch.ones(1), torch.zeros(1)).item()
        0.5
    """

    groundwire_aol: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(()))
        self.register_buffer("groundwire_aol", torch.empty(0))
        self.register_load_state_dict_pre_hook(_fill_in_logit)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Two tensors of one shape to the same shape."""
        share = self.logit.sigmoid()
        return share * x + (1 - share) * f


def _fill_in_logit(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of the plain model, which has no such module, keeps the share as it is."""
    if not any(key.startswith(prefix) for key in state):
        state.update({f"{prefix}{key}": value for key, value in module.state_dict().items()})


class ScaledConcat(nn.Module):
    """Branches concatenated along the channels and divided by the root of their number: 1-Lipschitz.

    Example:
        >>> ScaledConcat()([torch.ones(1, 1), torch.ones(1, 1)]).norm().item()
        0.99999...
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, branches: Any) -> Tensor:
        """Tensors whose shapes differ in ``dim`` only."""
        return torch.cat(tuple(branches), self.dim) / math.sqrt(len(branches))
