"""From sensitive features as people have them to integer codes: marginals, intersections, missing values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from groundwire_bias_audit.encoding import encoded, listed

#: More cells than this are no groups any more.
MOST_CELLS = 100_000


@dataclass(frozen=True)
class Groups:
    """Which group each row belongs to.

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
