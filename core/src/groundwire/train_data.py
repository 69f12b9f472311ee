"""The training rows of a loader, of which a plugin may choose some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from groundwire.errors import PluginError


class KeptRows(Subset[Any]):
    """The rows of a data set that plugins keep; what else is asked of it, the user's own data set answers.

    Attributes:
        dataset: The user's data set.
        indices: The kept rows of it.
    """

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask before there is a data set, and must not see what it does for itself.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["dataset"], name)


class TrainData:
    """The training data of a run, as ``gw_train_data`` sees it.

    Args:
        loader: The user's loader.
        on_reload: Called by :meth:`reload`.

    Attributes:
        loader: The user's loader.
        dataset: Its data set.
    """

    def __init__(self, loader: Any, on_reload: Callable[[], None] | None = None) -> None:
        self.loader = loader
        self.dataset: Any = getattr(loader, "dataset", None)
        self._on_reload = on_reload
        self._indices: list[int] | None = None
        self._weights: torch.Tensor | None = None

    def keep(self, indices: Sequence[int]) -> None:
        """Train on the rows ``indices`` of :attr:`dataset` only; several calls keep what all of them keep.

        Raises:
            PluginError: An index is out of range, nothing would remain, or the rows cannot be chosen.
        """
        size = self._size()
        wanted = [int(i) for i in indices]
        wrong = next((i for i in wanted if not 0 <= i < size), None)
        if wrong is not None:
            raise PluginError(f"keep: index {wrong} is outside the data set of {size} rows")
        allowed = None if self._indices is None else set(self._indices)
        self._indices = [i for i in wanted if allowed is None or i in allowed]
        if not self._indices:
            raise PluginError("keep: no training row would remain")

    def weights(self, values: Sequence[float]) -> None:
        """Draw row i with probability proportional to ``values[i]``, with replacement, as many rows as there are.

        Raises:
            PluginError: Wrong length, a negative or non-finite weight, or all zero.
        """
        weights = torch.as_tensor(values, dtype=torch.float64)
        if weights.shape != (self._size(),):
            raise PluginError(f"weights: {tuple(weights.shape)} given for a data set of {self._size()} rows")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise PluginError("weights must be finite, not negative, and not all zero")
        self._weights = weights if self._weights is None else self._weights * weights

    def reload(self) -> None:
        """Ask for the training data again at the next epoch."""
        if self._on_reload is not None:
            self._on_reload()

    def result(self) -> Any:
        """Return the user's loader, or one like it with the chosen rows."""
        if self._indices is None and self._weights is None:
            return self.loader
        indices = list(range(self._size())) if self._indices is None else self._indices
        dataset = self.dataset if self._indices is None else KeptRows(self.dataset, indices)
        weights = None if self._weights is None else self._weights[indices]
        return _like(self.loader, dataset, weights)

    def choice(self) -> tuple[list[int] | None, list[float] | None]:
        """Return the kept rows and the weights of all rows; None for each that nobody chose."""
        return self._indices, None if self._weights is None else self._weights.tolist()

    def _size(self) -> int:
        loader = self.loader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise PluginError(
                f"the training rows of a {type(loader).__name__} cannot be chosen -> use one DataLoader with a "
                "map-style data set"
            )
        return len(loader.dataset)  # type: ignore[arg-type]


def _like(loader: DataLoader[Any], dataset: Any, weights: torch.Tensor | None) -> DataLoader[Any]:
    """Return a loader that differs from ``loader`` in its rows only.

    Raises:
        PluginError: ``loader`` has a sampler of its own, whose indices mean rows of the old data set.
    """
    shuffled = type(loader.sampler) is RandomSampler
    if not (type(loader) is DataLoader and loader.batch_size is not None and _is_plain(loader.sampler)):
        raise PluginError(
            f"the training rows of a {type(loader).__name__} with {type(loader.sampler).__name__} cannot be "
            "chosen: its indices mean rows of the whole data set -> use shuffle=True, or select the rows before "
            "making the loader"
        )
    # The sampler's generator is the loader's own, unless the user made the sampler.
    generator = loader.sampler.generator if isinstance(loader.sampler, RandomSampler) else loader.generator
    sampler: Sampler[int] | None = RandomSampler(dataset, generator=generator) if shuffled else None
    if weights is not None:
        sampler = WeightedRandomSampler(weights.tolist(), len(weights), generator=generator)
    options = {name: getattr(loader, name) for name in _LOADER_OPTIONS if hasattr(loader, name)}
    return DataLoader(dataset, sampler=sampler, **options)


def _is_plain(sampler: Any) -> bool:
    """Tell whether ``sampler`` is what DataLoader makes of ``shuffle``: one over other rows can take its place."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler._num_samples is None
    return type(sampler) is SequentialSampler


#: What a loader with other rows takes over.
_LOADER_OPTIONS = (
    "batch_size",
    "drop_last",
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "multiprocessing_context",
    "pin_memory_device",
    "in_order",
)
