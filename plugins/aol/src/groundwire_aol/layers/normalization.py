"""Normalization without division, which is 1-Lipschitz: subtracting the mean of each channel."""

from __future__ import annotations

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

    Raises:
        ValueError: In ``forward``, for another number of channels, which would be copied to as many.

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
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"BatchCentering({self.num_features}) got an input of shape {tuple(x.shape)}")
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
