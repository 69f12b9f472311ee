"""Tensors as flat stretches of memory, and as groups along the input channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flat(tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """Return one-dimensional views in which entry i is the same entry in each tensor; None where that cannot be.

    It can if all have the same shape and strides and leave no gaps: contiguous, channels_last, transposed.

    Example:
        >>> a = torch.arange(6.0).view(2, 3)
        >>> flat([a.t(), None, a.t()])[0]
        tensor([0., 1., 2., 3., 4., 5.])
        >>> flat([a, a.t().contiguous().t()]) is None
        True
    """
    given = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in given):
        return [t if t is None else t.view(-1) for t in tensors]
    order = _memory_order(given[0])
    if any(t.shape != given[0].shape or t.stride() != given[0].stride() for t in given):
        return None
    if not given[0].permute(order).is_contiguous():
        return None
    return [t if t is None else t.permute(order).view(-1) for t in tensors]


def pieces(tensors: Sequence[Tensor | None], size: int) -> list[tuple[Tensor | None, ...]]:
    """Cut ``tensors`` alike into flat pieces of at most ``size`` entries; uncut where they are not flat together.

    Example:
        >>> [p for p, _ in pieces([torch.ones(3), None], 2)]
        [tensor([1., 1.]), tensor([1.])]
    """
    views = flat(tensors)
    if views is None:
        return [tuple(tensors)]
    length = next(t.numel() for t in views if t is not None)
    if length <= size:
        return [tuple(views)]
    count = -(-length // size)
    return list(zip(*([None] * count if t is None else torch.split(t, size) for t in views), strict=True))


def channels_last(t: Tensor) -> Tensor:
    """Return ``t`` with dimension 1, the input channels, moved to the end: the order in which N:M groups are counted.

    Example:
        >>> channels_last(torch.empty(8, 4, 3, 2)).shape
        torch.Size([8, 3, 2, 4])
    """
    return t.movedim(1, -1) if t.dim() > 2 else t


def groups_in_memory(t: Tensor) -> tuple[int, int] | None:
    """Return input channels and positions, if memory is in the order (output, input channel, position); else None.

    A tensor in channels_last format counts as one of a single position: there, groups are consecutive in memory.

    Example:
        >>> groups_in_memory(torch.empty(8, 4, 3, 2)), groups_in_memory(torch.empty(8, 4))
        ((4, 6), (4, 1))
        >>> groups_in_memory(torch.empty(8, 4, 3, 2).to(memory_format=torch.channels_last))
        (4, 1)
    """
    if channels_last(t).is_contiguous():
        return t.shape[1], 1
    return (t.shape[1], t[0, 0].numel()) if t.is_contiguous() else None


def _memory_order(t: Tensor) -> list[int]:
    return sorted(range(t.dim()), key=lambda d: (t.stride(d), t.shape[d]), reverse=True)
