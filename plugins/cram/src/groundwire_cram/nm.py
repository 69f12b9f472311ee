"""N:M sparsity: of every M consecutive weights along the input channels, the N largest stay."""

from __future__ import annotations

import re

import torch
from torch import Tensor


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"2:4"`` as (2, 4).

    Raises:
        ValueError: Not of that form, or not 0 < N < M.

    Example:
        >>> parse_pattern("4:8")
        (4, 8)
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m:
        raise ValueError(f'an N:M pattern is two numbers 0 < N < M, such as "2:4", got {pattern!r}')
    return n, m


def inputs_last(weight: Tensor) -> Tensor:
    """``weight`` (O, I, ...) as a view (O, ..., I), the order in which N:M groups are counted."""
    return weight.movedim(1, -1)


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """What an N:M pattern keeps: in each group of ``m`` the ``n`` entries of largest magnitude.

    Groups are consecutive entries of the weight with its input channels moved last, as the sparse tensor cores want
    them and as the published rule counts them. Of equal magnitudes the first in its group go first.

    Args:
        weight: (O, I, ...), with a number of entries that ``m`` divides.
        n: How many of a group stay, 0 < n < m.
        m: Size of a group.

    Returns:
        bool, the shape of ``weight``.

    Raises:
        ValueError: ``m`` does not divide the number of entries.

    Example:
        >>> nm_mask(torch.tensor([[1.0, -4.0, 3.0, 2.0]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    if weight.numel() % m:
        raise ValueError(f"{weight.numel()} weights are not divided by {m} into groups")
    moved = inputs_last(weight.detach()).abs()
    groups = moved.reshape(-1, m)
    # A stable ascending sort puts the earlier of equals first, so they are among the m - n that go.
    order = groups.sort(dim=1, stable=True).indices[:, m - n :]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return keep.reshape(moved.shape).movedim(-1, 1)
