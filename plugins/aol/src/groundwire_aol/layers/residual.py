"""Sums and concatenations of branches that stay 1-Lipschitz."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


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
