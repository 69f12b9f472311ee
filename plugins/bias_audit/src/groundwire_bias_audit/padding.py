"""Which rows a distributed sampler repeats to give every process as many."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def counted(sampler: Any, start: int, rows: int) -> NDArray[np.bool_] | None:
    """Which of ``rows`` rows, from position ``start`` of this process on, are no repetition.

    torch's ``DistributedSampler`` (also Lightning's) appends rows until all processes have as many, and deals them out
    in turn: position i of process r is row i * world + r of that list.

    Args:
        sampler: The loader's sampler.
        start: Rows that this process saw before, in this pass and loader.
        rows: Rows of the batch.

    Returns:
        None if all count.

    Example:
        >>> from torch.utils.data import DistributedSampler
        >>> sampler = DistributedSampler(range(5), num_replicas=2, rank=1, shuffle=False)
        >>> list(sampler), counted(sampler, 0, 3).tolist()
        ([1, 3, 0], [True, True, False])
    """
    world, rank = getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)
    total, data = getattr(sampler, "total_size", None), getattr(sampler, "dataset", None)
    if world is None or rank is None or total is None or data is None or total <= len(data):
        return None
    keep = (start + np.arange(rows)) * world + rank < len(data)
    return None if keep.all() else keep
