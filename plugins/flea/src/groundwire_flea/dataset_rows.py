"""Rows of map-style data sets, and values that are known without reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from groundwire import PluginError
from groundwire_flea.functional import Array

#: Rows that are read together.
CHUNK = 256


class SourceDatasets(ConcatDataset[Any]):
    """Data sets of several sources as one, with their names.

    Args:
        datasets: Map-style data set of each source, by name.

    Example:
        >>> rows = TensorDataset(torch.zeros(2, 3))
        >>> len(SourceDatasets({"A": rows, "B": rows}))
        4
    """

    def __init__(self, datasets: Mapping[Any, Dataset[Any]]) -> None:
        super().__init__(datasets.values())
        self.names = tuple(datasets)


def batches(loader: DataLoader[Any], index: Array | None) -> Iterator[tuple[Any, Sequence[int]]]:
    """Batches of the rows ``index`` (all when None) as the loader's own collate function makes them, and their places.

    The tensors of a TensorDataset come as one batch.
    """
    dataset = loader.dataset
    places = np.arange(len(dataset)) if index is None else index  # type: ignore[arg-type]
    if type(dataset) is TensorDataset and loader.collate_fn is torch.utils.data.default_collate:
        yield [t[places] for t in dataset.tensors], places.tolist()
        return
    rows: Dataset[Any] = Subset(dataset, places.tolist())
    options = {"num_workers": loader.num_workers, "collate_fn": loader.collate_fn, "generator": torch.Generator()}
    for number, batch in enumerate(DataLoader(rows, CHUNK, shuffle=False, **options)):  # type: ignore[arg-type]
        yield batch, places[number * CHUNK : (number + 1) * CHUNK].tolist()


def parts_of(dataset: Any) -> list[Any] | None:
    """The part of a ConcatDataset, also in a Subset, that each row is of: its name, or its number."""
    if isinstance(dataset, Subset):
        found = parts_of(dataset.dataset)
        return None if found is None else [found[i] for i in dataset.indices]
    if not isinstance(dataset, ConcatDataset):
        return None
    names = getattr(dataset, "names", range(len(dataset.datasets)))
    return [name for name, part in zip(names, dataset.datasets, strict=True) for _ in range(len(part))]  # type: ignore[arg-type]


def parts_have_names(dataset: Any) -> bool:
    """Whether :func:`parts_of` gives names."""
    return parts_have_names(dataset.dataset) if isinstance(dataset, Subset) else hasattr(dataset, "names")


def attribute(dataset: Any, name: str) -> Any:
    """An attribute of the data set (or of what a Subset is of) with one value for each row, or None."""
    if isinstance(dataset, Subset):
        found = attribute(dataset.dataset, name)
        return None if found is None else [found[i] for i in dataset.indices]
    found = getattr(dataset, name, None)
    if found is None or isinstance(found, str) or not hasattr(found, "__getitem__") or len(found) != len(dataset):
        return None
    return found


def chosen(sources: Sequence[Any], most: int, seed: int) -> Array:
    """Places of at most ``most`` rows of each source, drawn, in order."""
    order = np.random.default_rng(seed).permutation(len(sources))
    taken: dict[Any, int] = {}
    places = []
    for place in order.tolist():
        taken[sources[place]] = taken.get(sources[place], 0) + 1
        if taken[sources[place]] <= most:
            places.append(place)
    return np.sort(np.array(places, dtype=int))


def values(column: Any) -> list[Any]:
    """A column as Python's own numbers and strings; what is neither becomes its text."""
    if isinstance(column, Tensor):
        column = column.detach().cpu().reshape(len(column), -1)
        if column.shape[1] != 1:
            raise PluginError(f"flea: a source, group or label has {column.shape[1]} values a row, not one")
        column = column[:, 0]
    raw = column.tolist() if hasattr(column, "tolist") else list(column)
    raw = [v.item() if isinstance(v, Tensor | np.generic) else v for v in raw]
    return [v if v is None or isinstance(v, bool | int | float | str) else str(v) for v in raw]


def holders(batch: Any) -> list[Mapping[Any, Any]]:
    """What in a batch has keys: itself, its parts, and what these hold under a key."""
    parts = [batch, *(batch if isinstance(batch, list | tuple) else [])]
    outer = [part for part in parts if isinstance(part, Mapping)]
    return outer + [value for part in outer for value in part.values() if isinstance(value, Mapping)]


def joined(columns: Mapping[Any, Any]) -> list[str]:
    """Several columns as one, the intersections.

    Example:
        >>> joined({"sex": ["f", "m"], "old": torch.tensor([0, 1])})
        ['f, 0', 'm, 1']
    """
    return [", ".join(map(str, row)) for row in zip(*map(values, columns.values()), strict=True)]


def described(batch: Any) -> str:
    """What a batch looks like, for an error."""
    if isinstance(batch, Mapping):
        return f"keys {list(batch)}"
    return f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
