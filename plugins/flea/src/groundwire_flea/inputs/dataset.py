"""Data sets of several sources: features, labels, groups and sources of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from groundwire import Fields, PluginError
from groundwire.undo.random_states import preserve_rng
from groundwire_flea.inputs.embedding import features, principal_components, without_training

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
class LabelledRows:
    """Rows as they were read: x (R, d), labels, groups and sources."""

    x: NDArray[Any]
    y: Sequence[Any]
    groups: Sequence[Any]
    sources: Sequence[Any]


@dataclass(frozen=True)
class DatasetReader:
    """Reader of the rows of a map-style data set.

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
        known = self._known_sources(loader)
        if known is not None:
            return known
        with preserve_rng():
            return [v for batch, _ in batches(loader, None) for v in self._column(batch, self.source, "source")]

    def read(self, loader: DataLoader[Any], max_rows: int | None, seed: int) -> tuple[LabelledRows, list[Any]]:
        """The rows to compare, and the source of every row.

        Args:
            loader: The training loader.
            max_rows: Rows of a source to read at most, if sources are known without reading; else all rows are read.
            seed: Of the choice.

        Raises:
            PluginError: Source, group, label or inputs of a row cannot be found.
        """
        every = self._known_sources(loader)
        index = None if every is None or max_rows is None else sample_rows(every, max_rows, seed)
        groups = self._without_rows(loader.dataset, self.groups, "groups")
        parts: dict[str, list[Any]] = {"x": [], "y": [], "groups": [], "source": []}
        with preserve_rng(), without_training(self.embed):
            for batch, places in batches(loader, index):
                found = self._fields(batch)
                parts["x"].append(self._features(found.inputs))
                parts["y"] += plain_values(found.targets)
                parts["groups"] += (
                    self._column(batch, self.groups, "groups") if groups is None else [groups[i] for i in places]
                )
                parts["source"] += (
                    self._column(batch, self.source, "source") if every is None else [every[i] for i in places]
                )
        x = np.concatenate(parts["x"])
        table = self.embed is None and np.ndim(self._first(loader).inputs) == 2
        rows = LabelledRows(x if table else principal_components(x), parts["y"], parts["groups"], parts["source"])
        return rows, parts["source"] if every is None else every

    def _features(self, inputs: Any) -> NDArray[Any]:
        try:
            return features(inputs, self.embed)
        except ValueError as error:
            raise PluginError(f"flea: {error}") from error

    def _first(self, loader: DataLoader[Any]) -> Fields:
        """Fields of the first row, as a batch."""
        with preserve_rng():
            batch, _ = next(batches(loader, np.arange(1)))
            return self._fields(batch)

    def _known_sources(self, loader: DataLoader[Any]) -> list[Any] | None:
        """The source of every row without reading them. What rows say counts more than a part without a name."""
        known = self._without_rows(loader.dataset, self.source, "source")
        if known is None or self.source is not None or has_source_names(loader.dataset):
            return known
        return known if self._first(loader).source is None else None

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
            return concatenated_sources(dataset)
        if isinstance(where, str):
            found = row_attribute(dataset, where)
            return None if found is None else plain_values(found)
        if isinstance(where, Sequence | Tensor | np.ndarray) or hasattr(where, "to_numpy"):
            if len(where) != size:
                raise PluginError(f"flea: {name} has {len(where)} values, but the data set has {size} rows")
            return plain_values(where)
        if isinstance(where, int) and isinstance(dataset, TensorDataset) and where < len(dataset.tensors):
            return plain_values(dataset.tensors[where])
        return None

    def _column(self, batch: Any, where: Any, name: str) -> list[Any]:
        """The values of one role in a batch."""
        found = None
        if callable(where):
            found = where(batch)
        elif isinstance(where, int) and isinstance(batch, list | tuple) and -len(batch) <= where < len(batch):
            found = batch[where]
        elif isinstance(where, str):
            found = next((holder[where] for holder in mappings_in(batch) if where in holder), None)
        elif where is None:
            found = getattr(self._fields(batch), name)
        if found is None:
            asked = "" if where is None else f"={where!r}"
            raise PluginError(
                f"flea: {name}{asked} is not in the training batches ({describe_batch(batch)}) -> give {name}= as a "
                "key, a position, an attribute of the data set, one value for each row, or a function of a batch"
            )
        return intersections(found) if isinstance(found, Mapping) else plain_values(found)


def batches(loader: DataLoader[Any], index: NDArray[Any] | None) -> Iterator[tuple[Any, Sequence[int]]]:
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


def concatenated_sources(dataset: Any) -> list[Any] | None:
    """The part of a ConcatDataset, also in a Subset, that each row is of: its name, or its number."""
    if isinstance(dataset, Subset):
        found = concatenated_sources(dataset.dataset)
        return None if found is None else [found[i] for i in dataset.indices]
    if not isinstance(dataset, ConcatDataset):
        return None
    names = getattr(dataset, "names", range(len(dataset.datasets)))
    return [name for name, part in zip(names, dataset.datasets, strict=True) for _ in range(len(part))]  # type: ignore[arg-type]


def has_source_names(dataset: Any) -> bool:
    """True if :func:`concatenated_sources` gives names."""
    return has_source_names(dataset.dataset) if isinstance(dataset, Subset) else hasattr(dataset, "names")


def row_attribute(dataset: Any, name: str) -> Any:
    """An attribute of the data set (or of what a Subset is of) with one value for each row, or None."""
    if isinstance(dataset, Subset):
        found = row_attribute(dataset.dataset, name)
        return None if found is None else [found[i] for i in dataset.indices]
    found = getattr(dataset, name, None)
    if found is None or isinstance(found, str) or not hasattr(found, "__getitem__") or len(found) != len(dataset):
        return None
    return found


def sample_rows(sources: Sequence[Any], max_rows: int, seed: int) -> NDArray[Any]:
    """Places of at most ``max_rows`` rows of each source, drawn, in order; of copies in the same order the same rows.

    Example:
        >>> sample_rows(["a", "a", "a", "b", "b", "b"], 1, seed=0)
        array([1, 4])
    """
    codes, _ = pd.factorize(pd.Series(sources, dtype=object))
    within = pd.Series(codes).groupby(codes).cumcount()
    shuffled = pd.Series(np.random.default_rng(seed).permutation(within.max() + 1)[within])
    return np.flatnonzero(shuffled.groupby(codes).rank() <= max_rows)


def plain_values(column: Any) -> list[Any]:
    """A column as Python's own numbers and strings; what is neither becomes its text."""
    if isinstance(column, Tensor):
        column = column.detach().cpu().reshape(len(column), -1)
        if column.shape[1] != 1:
            raise PluginError(f"flea: a source, group or label has {column.shape[1]} values a row, not one")
        column = column[:, 0]
    raw = column.tolist() if hasattr(column, "tolist") else list(column)
    raw = [v.item() if isinstance(v, Tensor | np.generic) else v for v in raw]
    return [v if v is None or isinstance(v, bool | int | float | str) else str(v) for v in raw]


def mappings_in(batch: Any) -> list[Mapping[Any, Any]]:
    """Mappings in a batch: itself, its parts, and what these hold under a key."""
    parts = [batch, *(batch if isinstance(batch, list | tuple) else [])]
    outer = [part for part in parts if isinstance(part, Mapping)]
    return outer + [value for part in outer for value in part.values() if isinstance(value, Mapping)]


def intersections(columns: Mapping[Any, Any]) -> list[str]:
    """Several columns as one, the intersections.

    Example:
        >>> intersections({"sex": ["f", "m"], "old": torch.tensor([0, 1])})
        ['f, 0', 'm, 1']
    """
    return [", ".join(map(str, row)) for row in zip(*map(plain_values, columns.values()), strict=True)]


def describe_batch(batch: Any) -> str:
    """Description of a batch for an error."""
    if isinstance(batch, Mapping):
        return f"keys {list(batch)}"
    return f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
