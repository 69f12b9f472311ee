"""Rows of a training set: what they are made of, and which source and group each one has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from groundwire import Fields, PluginError
from groundwire.seeds import preserve_rng
from groundwire_flea.dataset_rows import (
    attribute,
    batches,
    chosen,
    described,
    holders,
    joined,
    parts_have_names,
    parts_of,
    values,
)
from groundwire_flea.embedding import evaluating, features, reduced
from groundwire_flea.functional import Array


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
        known = self._known_sources(loader)
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
        every = self._known_sources(loader)
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
        table = self.embed is None and np.ndim(self._first(loader).inputs) == 2
        place = np.arange(len(x)) if index is None else index
        rows = TrainingRows(x if table else reduced(x), parts["y"], parts["groups"], parts["source"], place)
        return rows, parts["source"] if every is None else every

    def _features(self, inputs: Any) -> Array:
        try:
            return features(inputs, self.embed)
        except ValueError as error:
            raise PluginError(f"flea: {error}") from error

    def _first(self, loader: DataLoader[Any]) -> Fields:
        """What the first row holds, as a batch."""
        with preserve_rng():
            batch, _ = next(batches(loader, np.arange(1)))
            return self._fields(batch)

    def _known_sources(self, loader: DataLoader[Any]) -> list[Any] | None:
        """The source of every row without reading them. What rows say counts more than a part without a name."""
        known = self._without_rows(loader.dataset, self.source, "source")
        if known is None or self.source is not None or parts_have_names(loader.dataset):
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
            found = next((holder[where] for holder in holders(batch) if where in holder), None)
        elif where is None:
            found = getattr(self._fields(batch), name)
        if found is None:
            asked = "" if where is None else f"={where!r}"
            raise PluginError(
                f"flea: {name}{asked} is not in the training batches ({described(batch)}) -> give {name}= as a key, a "
                "position, an attribute of the data set, one value for each row, or a function of a batch"
            )
        return joined(found) if isinstance(found, Mapping) else values(found)
