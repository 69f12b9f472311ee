"""One feature as people have it, in integer codes: numbers by counting, words by hashing, missing values apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MISSING = "unknown"


def encoded(name: str, values: Any, rows: int, max_groups: int) -> tuple[NDArray[Any], tuple[Any, ...]]:
    """Codes of the rows and the values that they stand for, in order.

    Args:
        name: Of the feature, for errors.
        values: List, array, tensor, Series, Categorical or Index; missing ones (None, NaN, NA, NaT) become "unknown".
        rows: Expected length.
        max_groups: Most different values.

    Raises:
        ValueError: The length differs from ``rows``, or there are too many values.

    Example:
        >>> codes, levels = encoded("sex", ["m", None, "f", "m"], 4, 100)
        >>> codes.tolist(), levels
        ([1, 2, 0, 1], ('f', 'm', 'unknown'))
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if isinstance(values, list | tuple):
        values = listed(values)
    if isinstance(values, np.ndarray) and values.dtype.kind in "mM":
        values = pd.Series(values)  # whose values are times, and not numbers of nanoseconds
    if len(values) != rows:
        raise ValueError(f"feature {name!r} has {len(values)} rows, and y_true has {rows} -> align them row by row")
    small = _small_integers(values)
    codes, levels = small if small is not None else _factorized(values)
    if (codes < 0).any():
        label = MISSING if MISSING not in levels else f"{MISSING} (missing)"
        codes = np.where(codes < 0, len(levels), codes)
        levels = (*levels, label)
    if len(levels) > max_groups:
        raise ValueError(
            f"feature {name!r} has {len(levels)} different values, more than max_groups={max_groups} -> bin it first, "
            "for example with pandas.cut, or raise max_groups"
        )
    return codes, levels


def listed(values: Any) -> NDArray[Any]:
    """Like ``np.array``, but None and NaN beside strings stay what they are."""
    if len(values) and isinstance(values[0], str):
        return np.array(values, dtype=object)
    plain = np.asarray(values)
    return plain if plain.dtype.kind in "biufM" or plain.ndim != 1 else np.array(values, dtype=object)


def joined(parts: Sequence[Any]) -> NDArray[Any]:
    """One feature of several batches as one array; ``tolist`` gives values as people have them.

    Args:
        parts: Arrays, tensors, lists or Series, of shape (n,) or (n, 1).

    Example:
        >>> joined([np.array([0, 1]), [1, None]]).tolist()
        [0, 1, 1, None]
    """
    columns = [_column(part) for part in parts]
    if len({c.dtype.kind for c in columns}) == 1:
        return columns[0] if len(columns) == 1 else np.concatenate(columns)
    return listed([value for c in columns for value in c.tolist()])


def _column(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        values = listed(values.tolist() if hasattr(values, "tolist") else list(values))
    if values.dtype.kind in "mM":  # as an object, a time is not a number of nanoseconds
        values = pd.Series(values).astype(object).to_numpy()
    column: NDArray[Any] = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    return column


def _small_integers(values: Any) -> tuple[NDArray[Any], tuple[Any, ...]] | None:
    """Codes by counting instead of hashing, where the values are integers of a small range."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "bui" or not len(values):
        return None
    if values.dtype == bool:
        values = values.view(np.uint8).astype(np.int8)
        present = np.flatnonzero(np.bincount(values, minlength=2))
        return (values if len(present) == 2 else np.zeros(len(values), np.int8)), tuple(bool(v) for v in present)
    low, high = int(values.min()), int(values.max())
    if high - low > 1023:
        return None
    shifted = np.subtract(values, low, dtype=np.int64) if low else values  # int8 does not hold 127 - (-128)
    present = np.flatnonzero(np.bincount(shifted))
    if len(present) == high - low + 1:
        return shifted, tuple(int(v) + low for v in present)
    table = np.zeros(high - low + 1, np.int64)
    table[present] = np.arange(len(present))
    return table[shifted], tuple(int(v) + low for v in present)


def _factorized(values: Any) -> tuple[NDArray[Any], tuple[Any, ...]]:
    if isinstance(values, np.ndarray) and values.dtype.kind == "U" and values.size * values.itemsize:
        codes, uniques = _fixed_width(values)
    else:
        values = values.astype(object) if isinstance(values, np.ndarray) and values.dtype.kind == "T" else values
        codes, uniques = pd.factorize(values, use_na_sentinel=True)
    levels = [v.item() if isinstance(v, np.generic) else v for v in uniques]
    order = _order(levels, getattr(getattr(values, "dtype", None), "categories", None))
    rank = np.empty(len(levels) + 1, np.int64)  # one more: the code of a missing value is -1
    rank[-1] = -1
    rank[order] = np.arange(len(levels))
    return rank[codes], tuple(levels[i] for i in order)


def _fixed_width(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """``pd.factorize`` of a ``<U`` array by its characters packed into integers: no string object for each row."""
    characters = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).view(np.uint32).reshape(len(values), -1)
    narrow = np.uint8 if characters.max() < 256 else np.uint32
    per_word = 8 // np.dtype(narrow).itemsize
    packed = np.zeros((len(values), -(-characters.shape[1] // per_word) * per_word), narrow)
    packed[:, : characters.shape[1]] = characters
    words = packed.view(np.uint64)
    codes, seen = pd.factorize(words[:, 0])
    for column in words.T[1:]:
        if (column != column[0]).any():
            more, values_of = pd.factorize(column)
            codes, seen = pd.factorize(codes * len(values_of) + more)
    example = np.empty(len(seen), np.int64)
    example[codes] = np.arange(len(codes))
    return codes, values[example]


def _order(levels: list[Any], categories: Any) -> list[int]:
    if categories is not None:
        place = {category: i for i, category in enumerate(categories)}
        return sorted(range(len(levels)), key=lambda i: place[levels[i]])
    try:
        return sorted(range(len(levels)), key=lambda i: levels[i])
    except TypeError:  # values of several types
        return sorted(range(len(levels)), key=lambda i: (type(levels[i]).__name__, str(levels[i])))
