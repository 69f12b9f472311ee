"""2:4 sparsity on CUDA by torch's semi-structured tensors. On the CPU they do not exist. Not measured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether each group of four along a row has two zeros at least.

    Example:
        >>> is_two_of_four(torch.tensor([[1.0, 0.0, 0.0, 2.0]])), is_two_of_four(torch.ones(1, 4))
        (True, False)
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach().reshape(len(weight), -1, 4) != 0).sum(2) <= 2).all())


def obstacle(layer: nn.Module) -> str | None:
    """Say why a layer on CUDA must stay dense, or None."""
    weight = layer.weight
    if not isinstance(layer, nn.Linear) or not isinstance(weight, Tensor):
        return "on CUDA, only Linear layers are supported"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"on CUDA, 2:4 needs float16 or bfloat16, got {weight.dtype}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "on CUDA, 2:4 needs compute capability 8.0"
    return None if is_two_of_four(weight) else "on CUDA, only the pattern 2:4 is supported"


def converted(layer: nn.Linear) -> nn.Linear:
    """Return a copy of ``layer`` whose weight is a semi-structured tensor.

    Raises:
        RuntimeError: torch cannot hold a weight of this shape so.
    """
    twin = copy.deepcopy(layer)
    weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    twin.weight = nn.Parameter(weight, requires_grad=False)
    return twin.requires_grad_(False)


def is_converted(layer: nn.Module) -> bool:
    """Return whether ``layer`` came from :func:`converted`."""
    return type(layer) is nn.Linear and isinstance(layer.weight.data, torch.sparse.SparseSemiStructuredTensor)


def size(layer: nn.Module) -> int:
    """Return the bytes of a converted weight: half of the values, and where they are."""
    weight: Any = layer.weight
    return sum(
        part.numel() * part.element_size() for part in (weight.data.packed, weight.data.meta) if part is not None
    )
