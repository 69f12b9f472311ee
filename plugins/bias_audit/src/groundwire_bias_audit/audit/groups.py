"""Sensitive features as people have them, as integer codes: marginals, intersections, missing values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


#: More cells than this are no groups any more.
MOST_CELLS = 100_000


@dataclass(frozen=True)
class Groups:
    """Groups of the rows, as integer codes.

    Attributes:
        names: Feature names, control features first.
        levels: Values of each feature, in order.
        controls: How many of the features are control features.
        codes: Cell of each row in the product of all levels, the last feature fastest; shape (n,).
    """

    names: tuple[str, ...]
    levels: tuple[tuple[Any, ...], ...]
    controls: int = 0
    codes: NDArray[Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of levels of each feature."""
        return tuple(len(level) for level in self.levels)

    @property
    def size(self) -> int:
        """Number of cells in the product of all features."""
        return math.prod(self.shape)

    @property
    def sensitive(self) -> tuple[str, ...]:
        """Names of the sensitive features."""
        return self.names[self.controls :]

    @property
    def index(self) -> pd.Index:
        """The groups as a pandas index: plain for one feature, a product for several."""
        if len(self.names) == 1:
            return pd.Index(self.levels[0], name=self.names[0])
        return pd.MultiIndex.from_product(self.levels, names=self.names)

    def keep(self, names: Sequence[str]) -> Groups:
        """Only ``names`` and the control features; codes are projected."""
        axes = [i for i, name in enumerate(self.names) if i < self.controls or name in names]
        if len(axes) == len(self.names):
            return self
        levels = tuple(self.levels[i] for i in axes)
        codes = None
        if self.codes is not None:
            coordinates = np.unravel_index(self.codes, self.shape)
            codes = np.ravel_multi_index([coordinates[i] for i in axes], tuple(map(len, levels)))
        return Groups(tuple(self.names[i] for i in axes), levels, self.controls, codes)

    def marginal(self, counts: NDArray[Any], names: Sequence[str]) -> NDArray[Any]:
        """``counts`` (cells first) summed over the features that are not in ``names`` and not control features."""
        other = tuple(i for i, name in enumerate(self.names) if i >= self.controls and name not in names)
        summed: NDArray[Any] = counts.reshape(*self.shape, *counts.shape[1:]).sum(axis=other)
        return summed.reshape(-1, *counts.shape[1:])


def read_groups(sensitive: Any, control: Any = None, *, rows: int, max_groups: int = 100) -> Groups:
    """Codes of one or several features.

    Args:
        sensitive: One feature (list, array, tensor, Series) or several (DataFrame, mapping, array of shape (n, k)).
        control: Control features in the same forms, or None.
        rows: Expected length n.
        max_groups: Most values that a feature may have.

    Returns:
        Missing values (None, NaN, NA, NaT) are a group of their own, "unknown".

    Raises:
        ValueError: A length differs from ``rows``, a feature has no name of its own, or has too many values.

    Example:
        >>> groups = read_groups({"sex": ["f", "m", None], "old": [0, 1, 1]}, rows=3)
        >>> groups.levels, groups.codes.tolist()
        ((('f', 'm', 'unknown'), (0, 1)), [0, 3, 5])
    """
    controls = [] if control is None else named_columns(control, "control_feature")
    features = controls + named_columns(sensitive, "sensitive_feature")
    names = tuple(name for name, _ in features)
    if len(set(names)) < len(names):
        raise ValueError(f"feature names must differ, got {list(names)} -> rename the columns")
    if len(features) == len(controls):
        raise ValueError("sensitive_features has no column -> give at least one feature")
    coded = [encoded(name, values, rows, max_groups) for name, values in features]
    shape = tuple(len(levels) for _, levels in coded)
    if math.prod(shape) > MOST_CELLS:
        raise ValueError(
            f"the features {list(names)} cross to {math.prod(shape):,} groups ({' x '.join(map(str, shape))}), "
            f"more than {MOST_CELLS:,} -> audit fewer features at a time, or coarser ones"
        )
    codes = coded[0][0]
    for (more, _), size in zip(coded[1:], shape[1:], strict=True):
        codes = codes.astype(np.int64) * size + more
    return Groups(names, tuple(levels for _, levels in coded), len(controls), codes)


def named_columns(values: Any, prefix: str) -> list[tuple[str, Any]]:
    """Features by name, from one column or several; those without a name are numbered after ``prefix``."""
    if isinstance(values, pd.DataFrame | Mapping):
        return [(str(name), values[name]) for name in values]
    if isinstance(values, pd.Series):
        return [(f"{prefix}_0" if values.name is None else str(values.name), values)]
    if values is None:
        raise ValueError(f"{prefix}s is None -> give one value for each row")
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if not isinstance(values, pd.api.extensions.ExtensionArray | pd.Index):
        values = values if isinstance(values, np.ndarray) else listed(values)
        if values.ndim == 2:
            return [(f"{prefix}_{i}", values[:, i]) for i in range(values.shape[1])]
        if values.ndim != 1:
            raise ValueError(f"{prefix}s must have shape (n,) or (n, k), got {values.shape}")
    return [(f"{prefix}_0", values)]


def as_tuple(label: Any) -> tuple[Any, ...]:
    """A group's values, of one feature or several."""
    return label if isinstance(label, tuple) else (label,)


def unwrapped(label: Any) -> Any:
    """The only value of a tuple of one, and anything else as it is."""
    return label[0] if isinstance(label, tuple) and len(label) == 1 else label


def by_target(frames: Mapping[Any, pd.DataFrame]) -> pd.DataFrame:
    """Tables of several targets as one; the target is the last level of the index.

    Example:
        >>> table = pd.DataFrame({"count": [2, 3]}, index=pd.Index(["f", "m"], name="sex"))
        >>> by_target({"hat": table, "beard": table}).index.tolist()
        [('f', 'hat'), ('f', 'beard'), ('m', 'hat'), ('m', 'beard')]
    """
    first = next(iter(frames.values())).index
    level = "target" if "target" not in first.names else "target of the model"
    joined = pd.concat(frames, names=[level, *first.names])
    order = [(*as_tuple(label), target) for label in first for target in frames]
    return joined.reorder_levels([*range(1, joined.index.nlevels), 0]).reindex(order)


def with_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with its index as columns; a feature called like a metric is "group <name>".

    Example:
        >>> with_groups(pd.DataFrame({"count": [3]}, index=pd.Index(["f"], name="count"))).columns.tolist()
        ['group count', 'count']
    """
    taken = set(map(str, frame.columns))
    return frame.reset_index(names=[f"group {name}" if str(name) in taken else name for name in frame.index.names])
