"""Rows of a training set: what they are made of, and which source and group each one has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from groundwire import Fields, PluginError
from groundwire.seeds import preserve_rng
from groundwire_flea.embedding import evaluating, features, reduced
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


@dataclass(frozen=True)
class TrainingRows:
    """What was read.

    Attributes:
        x: (R, d) features.
        y: (R,) labels.
        groups: (R,) groups.
        sources: (R,) sources.
        index: (R,) place of each row in the data set; not all rows need to have been read.
    """

    x: Array
    y: Sequence[Any]
    groups: Sequence[Any]
    sources: Sequence[Any]
    index: Array


@dataclass(frozen=True)
class Reader:
    """Reads rows of a map-style data set.

    Args:
        source: Where a row's source is: None for the batch's field ``source`` or the parts of a ConcatDataset; a
            string for a key of the row, or an attribute of the data set; an int for a position in the row; a sequence
            with one value for each row; a function of a batch.
        groups: Where a row's group is, likewise.
        fields: Tells what a batch holds.
        embed: Turns inputs into features, or None.
    """

    source: Any
    groups: Any
    fields: Callable[[Any], Fields]
    embed: Callable[[Any], Any] | None = None

    def sources(self, loader: DataLoader[Any]) -> list[Any]:
        """The source of every row, read without the rows where that is possible.

        Raises:
            PluginError: It cannot be found.
        """
        known = self._without_rows(loader.dataset, self.source, "source")
        if known is not None:
            return known
        with preserve_rng():
            return [v for batch, _ in batches(loader, None) for v in self._column(batch, self.source, "source")]

    def read(self, loader: DataLoader[Any], most: int | None, seed: int) -> tuple[TrainingRows, list[Any]]:
        """The rows to compare, and the source of every row.

        Args:
            loader: The training loader.
            most: Rows of a source to read at most, if sources are known without reading; else all rows are read.
            seed: Of the choice.

        Raises:
            PluginError: Source, group, label or inputs of a row cannot be found.
        """
        every = self._without_rows(loader.dataset, self.source, "source")
        index = None if every is None or most is None else chosen(every, most, seed)
        groups = self._without_rows(loader.dataset, self.groups, "groups")
        parts: dict[str, list[Any]] = {"x": [], "y": [], "groups": [], "source": []}
        with preserve_rng(), evaluating(self.embed):
            for batch, places in batches(loader, index):
                found = self._fields(batch)
                parts["x"].append(self._features(found.inputs))
                parts["y"] += values(found.targets)
                parts["groups"] += (
                    self._column(batch, self.groups, "groups") if groups is None else [groups[i] for i in places]
                )
                parts["source"] += (
                    self._column(batch, self.source, "source") if every is None else [every[i] for i in places]
                )
        x = np.concatenate(parts["x"])
        table = self.embed is None and self._is_table(loader)
        place = np.arange(len(x)) if index is None else index
        rows = TrainingRows(x if table else reduced(x), parts["y"], parts["groups"], parts["source"], place)
        return rows, parts["source"] if every is None else every

    def _features(self, inputs: Any) -> Array:
        try:
            return features(inputs, self.embed)
        except ValueError as error:
            raise PluginError(f"flea: {error}") from error

    def _is_table(self, loader: DataLoader[Any]) -> bool:
        batch, _ = next(batches(loader, np.arange(1)))
        return np.ndim(self._fields(batch).inputs) == 2

    def _fields(self, batch: Any) -> Fields:
        """The batch's fields; of a longer tuple, the first two count as inputs and targets."""
        try:
            found = self.fields(batch)
        except PluginError:
            if not isinstance(batch, list | tuple) or len(batch) < 2:
                raise
            found = Fields(batch[0], targets=batch[1])
        if found.targets is None:
            raise PluginError(
                "flea: the training batches have no targets -> name them y or target, or use Plugins(fields=...)"
            )
        return found

    def _without_rows(self, dataset: Any, where: Any, name: str) -> list[Any] | None:
        """The value of every row, if it can be known without reading rows."""
        size = len(dataset)
        if where is None and name == "source":
            return parts_of(dataset)
        if isinstance(where, str):
            found = attribute(dataset, where)
            return None if found is None else values(found)
        if isinstance(where, Sequence | Tensor | np.ndarray) or hasattr(where, "to_numpy"):
            if len(where) != size:
                raise PluginError(f"flea: {name} has {len(where)} values, but the data set has {size} rows")
            return values(where)
        if isinstance(where, int) and isinstance(dataset, TensorDataset) and where < len(dataset.tensors):
            return values(dataset.tensors[where])
        return None

    def _column(self, batch: Any, where: Any, name: str) -> list[Any]:
        """The values of one role in a batch."""
        found = None
        if callable(where):
            found = where(batch)
        elif isinstance(where, int) and isinstance(batch, list | tuple) and -len(batch) <= where < len(batch):
            found = batch[where]
        elif isinstance(where, str):
            holders = [batch, *(batch if isinstance(batch, list | tuple) else [])]
            found = next((h[where] for h in holders if isinstance(h, Mapping) and where in h), None)
        elif where is None:
            found = getattr(self._fields(batch), name)
        if found is None:
            asked = "" if where is None else f"={where!r}"
            raise PluginError(
                f"flea: {name}{asked} is not in the training batches ({described(batch)}) -> give {name}= as a key, a "
                "position, an attribute of the data set, one value for each row, or a function of a batch"
            )
        return values(found)


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
    """The part of a ConcatDataset that each row is of: its name, or its number."""
    if not isinstance(dataset, ConcatDataset):
        return None
    names = getattr(dataset, "names", range(len(dataset.datasets)))
    return [name for name, part in zip(names, dataset.datasets, strict=True) for _ in range(len(part))]  # type: ignore[arg-type]


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


def described(batch: Any) -> str:
    """What a batch looks like, for an error."""
    if isinstance(batch, Mapping):
        return f"keys {list(batch)}"
    return f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
