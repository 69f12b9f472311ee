"""Memory for the saved weights: one block, kept from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Uninitialised tensors like the weights, by name: the one copy of the parameters that a step needs.

    They are parts of one block for each kind of tensor. On a CPU it comes from NumPy, which asks for huge pages:
    walking through 25 million weights then misses fewer of them.

    Example:
        >>> buffers = Buffers()
        >>> buffers.like({"w": torch.ones(2, 3)})["w"].shape
        torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def like(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a tensor for each weight, of its shape, dtype and device; the same ones as long as these stay."""
        if any(not _alike(self._known.get(name), weight) for name, weight in weights.items()):
            self._known = {**self._known, **_allocated(weights)}
        return {name: self._known[name] for name in weights}

    def clear(self) -> None:
        """Give the memory back."""
        self._known.clear()


def _alike(copy: Tensor | None, weight: Tensor) -> bool:
    if copy is None:
        return False
    return copy.shape == weight.shape and copy.dtype == weight.dtype and copy.device == weight.device


def _allocated(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind in {(w.dtype, w.device) for w in weights.values()}:
        names = [name for name, w in weights.items() if (w.dtype, w.device) == kind]
        sizes = [weights[name].numel() for name in names]
        for name, part in zip(names, torch.split(_block(sum(sizes), *kind), sizes), strict=True):
            found[name] = _laid_out_like(part, weights[name])
    return found


def _block(entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(entries, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(entries * dtype.itemsize, dtype=np.uint8)).view(dtype)


def _laid_out_like(part: Tensor, weight: Tensor) -> Tensor:
    """Give ``part`` the strides of a weight that has no gaps, so that a kernel walks through both in one order."""
    strides = torch.empty_like(weight, device="meta").stride()
    return part.as_strided(weight.shape, strides)
