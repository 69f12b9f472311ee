"""Work on several processor cores, by threads that a process makes for itself when it first needs them.

Numba's own parallel loops use OpenMP by default: once a process has run one, a forked child that runs one is killed.
Here a forked child has no pool, and makes one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
#: Entries below which another thread costs more than it brings.
WORTHWHILE = 1 << 17
#: What one thread counts must fit into 32 bits.
_MOST = 1 << 31

_pools: list[ThreadPoolExecutor] = []
# What is left of the parent's threads in a child are objects that nobody runs.
os.register_at_fork(after_in_child=_pools.clear)

#: Of tensor number ``index`` the entries (or groups) from ``start`` to before ``stop``.
Slice = tuple[int, int, int]


def cut(sizes: Sequence[int], entries_each: int = 1) -> list[list[Slice]]:
    """Return slices of tensors of these sizes, shared out evenly to as many threads as torch uses and are worthwhile.

    Args:
        sizes: How many items each tensor has.
        entries_each: How many entries of a tensor are one item.

    Example:
        >>> cut([3, 0, 4])
        [[(0, 0, 3), (2, 0, 4)]]
        >>> previous = torch.get_num_threads()
        >>> torch.set_num_threads(2)
        >>> cut([1_000_000, 500_000])
        [[(0, 0, 750000)], [(0, 750000, 1000000), (1, 0, 500000)]]
        >>> torch.set_num_threads(previous)
    """
    total = sum(sizes)
    threads = min(torch.get_num_threads(), max(1, total * entries_each // WORTHWHILE))
    share = max(1, -(-total // max(threads, -(-total // _MOST))))
    parts: list[list[Slice]] = []
    room = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if room == 0:
                parts.append([])
                room = share
            stop = min(size, start + room)
            parts[-1].append((index, start, stop))
            room -= stop - start
            start = stop
    return parts


def in_parallel(work: Callable[[_Part], _Result], parts: Sequence[_Part]) -> list[_Result]:
    """Return what ``work`` returns for each part; the calling thread does the first.

    Example:
        >>> in_parallel(len, [[(0, 0, 3)], [(0, 3, 5), (1, 0, 2)]])
        [1, 2]
    """
    others = [_pool().submit(work, part) for part in parts[1:]]
    return [work(part) for part in parts[:1]] + [other.result() for other in others]


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), "cram-kernels"))
    return _pools[0]
