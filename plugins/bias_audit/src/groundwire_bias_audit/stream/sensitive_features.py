"""Sensitive features of a batch: from the batch, an attribute of its data set, or a side table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from groundwire import Fields, PluginError

#: What :meth:`SideTable.keys` calls the ids.
KEYS = "id"


class SideTable:
    """A table with one row for each sample.

    Args:
        source: DataFrame or Series with the id as index or column ``id``, mapping from id to value, path of a CSV or
            Parquet file with a column ``id``.

    Raises:
        PluginError: An id is there twice, or the file cannot be read.

    Example:
        >>> SideTable({7: "f", 8: "m"}).joined(np.array([8, 7, 8]))["group"].tolist()
        ['m', 'f', 'm']
    """

    def __init__(self, source: Any) -> None:
        self._index, self._columns = _columns(_table(source))
        # Ids are often the rows of the data set; looking them up would cost more than all the rest of a batch.
        self._by_position = self._index.equals(pd.RangeIndex(len(self._index)))

    def keys(self, fields: Fields, ids: Sequence[int] | NDArray[Any] | None) -> dict[str, Any]:
        """The ids of a batch's rows: those that it carries, else those of the data set.

        Raises:
            PluginError: It has neither.
        """
        found = fields.ids if fields.ids is not None else ids
        if found is None:
            raise PluginError(
                "a side table is joined on sample ids, and this batch has none (no key ids, id or index, and no data "
                "set indices) -> give the batch an 'id', or use a map-style data set"
            )
        return {KEYS: found.detach().cpu().numpy() if hasattr(found, "detach") else np.asarray(found)}

    def joined(self, keys: NDArray[Any]) -> dict[str, Any]:
        """Each feature for the rows with these ids.

        Raises:
            PluginError: An id is not in the table.
        """
        places = self._places(keys)
        if (places < 0).any():
            lost = keys[places < 0].tolist()
            raise PluginError(
                f"the side table has no row for {len(lost)} of {len(keys)} samples, such as id {lost[0]!r} "
                f"(its index looks like {self._index[:3].tolist()}) -> complete the table or mend the ids"
            )
        return {name: values[places] for name, values in self._columns.items()}

    def _places(self, keys: NDArray[Any]) -> NDArray[Any]:
        """Row of the table for each id, -1 where there is none."""
        if self._by_position and keys.dtype.kind in "iu":
            return np.where((keys >= 0) & (keys < len(self._index)), keys, -1)
        return np.asarray(self._index.get_indexer(keys))


def is_file(source: Any) -> bool:
    """True if ``source`` is the name of a table's file."""
    return isinstance(source, str) and Path(source).suffix.lower() in (".csv", ".parquet")


def _columns(table: pd.DataFrame) -> tuple[pd.Index, dict[str, NDArray[Any]]]:
    return table.index, {str(name): table[name].to_numpy() for name in table}


def _table(source: Any) -> pd.DataFrame:
    if isinstance(source, str | Path):
        source = _read(Path(source))
    if isinstance(source, Mapping):
        source = pd.Series(source, name="group")
    if isinstance(source, pd.Series):
        source = source.to_frame("group" if source.name is None else str(source.name))
    if "id" in source:
        source = source.set_index("id")
    twice = source.index[source.index.duplicated()].tolist()
    if twice:
        raise PluginError(
            f"the side table has {len(twice)} repeated ids, such as {twice[0]!r} -> keep one row for each"
        )
    return source


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else pd.read_csv(path)
    except (OSError, ImportError, ValueError) as error:
        raise PluginError(f"the side table {path} cannot be read: {error}") from error
    if "id" not in table:
        raise PluginError(f"the side table {path} has the columns {list(table)} -> name the one of the sample ids 'id'")
    return table


#: What ``BiasAudit(groups=...)`` takes.
Source: TypeAlias = (
    str | Path | Sequence[str] | pd.DataFrame | pd.Series | Mapping[Any, Any] | Callable[[Any], Any] | None
)
DATASET_NAMES = ("groups", "group", "sensitive", "sensitive_features")


class GroupReader:
    """Reads the features of a batch.

    Args:
        source: None (the batch's ``groups``, or such an attribute of the data set), the name of a batch key or data
            set attribute or several, a side table by sample id (DataFrame or Series with the id as index, mapping from
            id to value, path of a CSV or Parquet file with a column ``id``), or ``callable(batch)``.

    Raises:
        PluginError: The side table has an id twice, or cannot be read.

    Example:
        >>> GroupReader("sex")({"x": 0, "sex": ["f", "m"]}, Fields(0), None, None)
        {'sex': ['f', 'm']}
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.table: SideTable | None = None
        self._cache: dict[tuple[int, str], Any] = {}
        if callable(source):
            return
        if isinstance(source, Mapping | pd.DataFrame | pd.Series | Path) or is_file(source):
            self.table = SideTable(source)
        elif source is not None and not isinstance(source, str):
            names = list(source)
            if not names or not all(isinstance(name, str) for name in names):
                raise PluginError(f"groups must be names, a table or a callable, got {source!r}")

    def __call__(self, batch: Any, fields: Fields, ids: Sequence[int] | None, dataset: Any) -> dict[str, Any]:
        """The value of each feature for each row of ``batch``.

        Args:
            batch: As the loader gave it.
            fields: What core read in it.
            ids: Data set indices of the rows, if known.
            dataset: The data set, if known.

        Raises:
            PluginError: Nothing was found; the text says where it was looked for.
        """
        return self.resolved(self.read(batch, fields, ids, dataset))

    def resolved(self, read: Mapping[str, Any]) -> dict[str, Any]:
        """The features, from what :meth:`read` gave for one batch or several joined ones."""
        return dict(read) if self.table is None else self.table.joined(read[KEYS])

    def read(self, batch: Any, fields: Fields, ids: Any, dataset: Any) -> dict[str, Any]:
        """Take from the batch what must be taken now: the features, or only the ids where a side table has them.

        A side table is joined for many batches at a time, which costs far less than batch by batch.
        """
        if callable(self.source):
            return named(self.source(batch))
        if self.table is not None:
            return self.table.keys(fields, ids)
        names = [self.source] if isinstance(self.source, str) else self.source
        if names is None:
            return self._default(fields, ids, dataset)
        return {str(name): self._named(str(name), batch, ids, dataset) for name in names}  # type: ignore[union-attr]

    def _default(self, fields: Fields, ids: Sequence[int] | None, dataset: Any) -> dict[str, Any]:
        if fields.groups is not None:
            return named(fields.groups)
        for name in DATASET_NAMES:
            values = self._attribute(dataset, name)
            if values is not None and ids is not None:
                return named(_rows(values, ids))
        raise PluginError(
            "BiasAudit found no groups: the batch has none of the keys groups, group, sensitive, and the data set none "
            f"of the attributes {', '.join(DATASET_NAMES)} -> pass BiasAudit(groups=...) with the name of a key or "
            "attribute, a table by sample id, or a callable"
        )

    def _named(self, name: str, batch: Any, ids: Sequence[int] | None, dataset: Any) -> Any:
        for mapping in (batch, batch[-1] if isinstance(batch, list | tuple) and batch else None):
            if isinstance(mapping, Mapping) and name in mapping:
                return mapping[name]
        values = self._attribute(dataset, name)
        if values is not None and ids is not None:
            return _rows(values, ids)
        keys = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise PluginError(
            f"BiasAudit found no {name!r}: not in the batch ({keys}), and "
            + (f"{type(dataset).__name__} has no such attribute" if values is None else "the loader has no row indices")
            + " -> pass groups= with another name, a table by sample id, or a callable"
        )

    def _attribute(self, dataset: Any, name: str) -> Any:
        key = (id(dataset), name)
        if key not in self._cache:
            values = attribute_of(dataset, name)
            if values is not None and len(values) != len(dataset):
                raise PluginError(
                    f"{type(dataset).__name__}.{name} has {len(values)} entries for {len(dataset)} samples"
                )
            self._cache[key] = values
        return self._cache[key]


def named(values: Any) -> dict[str, Any]:
    """Features by name, from one column or several.

    Example:
        >>> named({"sex": [0]}), named(np.array([[1, 2]]))
        ({'sex': [0]}, {'group_0': array([1]), 'group_1': array([2])})
    """
    if isinstance(values, Mapping | pd.DataFrame):
        return {str(name): values[name] for name in values}
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if getattr(values, "ndim", 1) == 2:
        return {f"group_{i}": values[:, i] for i in range(values.shape[1])}
    return {"group": values}


def attribute_of(dataset: Any, name: str) -> Any:
    """``dataset.name`` row by row, through ``Subset`` and ``ConcatDataset``; None if there is none."""
    if dataset is None:
        return None
    if isinstance(dataset, Subset):
        inner = attribute_of(dataset.dataset, name)
        return None if inner is None else _rows(inner, dataset.indices)
    if isinstance(dataset, ConcatDataset):
        parts = [attribute_of(part, name) for part in dataset.datasets]
        return None if any(part is None for part in parts) else _concatenated(parts)
    values = getattr(dataset, name, None)
    if callable(values):
        return None
    return pd.DataFrame({k: _host(v) for k, v in values.items()}) if isinstance(values, Mapping) else _host(values)


def _host(values: Any) -> Any:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def _rows(values: Any, ids: Iterable[int]) -> Any:
    places = list(ids)
    if isinstance(values, pd.DataFrame | pd.Series):
        return values.iloc[places]
    return values[places] if isinstance(values, np.ndarray) else [values[i] for i in places]


def _concatenated(parts: Sequence[Any]) -> Any:
    if all(isinstance(part, pd.DataFrame | pd.Series) for part in parts):
        return pd.concat(parts)
    return [value for part in parts for value in part]
