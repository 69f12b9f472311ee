"""Sensitive features in a table beside the data, joined on sample id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
    """Whether ``source`` is the name of a table's file."""
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
