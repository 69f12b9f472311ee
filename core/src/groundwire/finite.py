"""A test for gradients with NaN or infinities."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor holds NaN or an infinity.

    A finite sum proves it cheaply; otherwise every entry is looked at.

    Example:
        >>> all_finite([torch.ones(2)]), all_finite([torch.tensor([1.0, float("nan")])])
        (True, False)
    """
    values = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    if not values or math.isfinite(torch.stack([v.sum(dtype=torch.float32) for v in values]).sum().item()):
        return True
    return all(bool(torch.isfinite(v).all()) for v in values)
