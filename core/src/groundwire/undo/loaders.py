"""The random states and positions of loaders, put back after a pass through their data that nobody is to notice."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from groundwire.undo.random_states import GENERATORS, rewinding

#: A longer container, such as a table of rows, is not what a sampler counts with.
_LARGEST = 10_000


@contextmanager
def loaders_restored(loaders: Iterable[Any]) -> Iterator[None]:
    """Context manager that puts back what a pass through ``loaders`` moves, so that the next one gives what it would.

    Put back: the random generators of each loader, of its samplers and of its data set, and the samplers' own
    attributes. Not undone: what worker processes that outlive a pass (``persistent_workers``) hold, and files.

    Example:
        >>> loader = DataLoader([1, 2, 3, 4], shuffle=True, generator=torch.Generator().manual_seed(1))
        >>> with loaders_restored([loader]):
        ...     first = list(loader)
        >>> list(loader) == first
        True
    """
    walk = _Walk()
    for loader in loaders:
        walk.visit(loader, samples=isinstance(loader, DataLoader))
    try:
        yield
    finally:
        for undo in reversed(walk.undo):
            undo()


class _Walk:
    """Goes through what a loader holds and notes how each part is put back.

    Attributes:
        undo: What puts the parts back.
    """

    def __init__(self) -> None:
        self.undo: list[Callable[[], Any]] = []
        self._seen: set[int] = set()

    def visit(self, value: Any, samples: bool) -> None:
        """Note the state of ``value``; of what is no sampler, its random generators only."""
        if id(value) in self._seen or isinstance(value, type | torch.Tensor | np.ndarray):
            return
        self._seen.add(id(value))
        if isinstance(value, GENERATORS):
            self.undo.append(rewinding(value))
        elif isinstance(value, DataLoader):
            for name in ("generator", "sampler", "batch_sampler"):
                self.visit(getattr(value, name), samples=True)
            self.visit(value.dataset, samples=False)
        elif isinstance(value, list | dict | set | deque):
            if samples and len(value) <= _LARGEST:
                self.undo.append(functools.partial(_refill, value, value.copy()))
        elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, torch.nn.Module):
            self._visit_object(value, samples)

    def _visit_object(self, value: Any, samples: bool) -> None:
        samples = samples and not isinstance(value, Dataset)
        before = dict(vars(value))
        if samples:
            self.undo.append(functools.partial(_rebind, vars(value), before))
        for item in before.values():
            if samples or isinstance(item, (*GENERATORS, Dataset)):
                self.visit(item, samples)


def _rebind(store: dict[str, Any], before: dict[str, Any]) -> None:
    store.clear()
    store.update(before)


def _refill(container: Any, before: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(before)
