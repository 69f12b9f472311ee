"""Encoding of arrays, data frames and tensors as standardised numbers, or a clear refusal."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from groundwire_flea.inputs.validation import codes_of, column_of, frame_of, same_length, values_of

#: A text column of more different values is taken for an identifier.
MOST_LEVELS = 50
#: Labels or groups with fractions and more different values are taken for a measurement.
MOST_VALUES = 20
#: What ``infer_dtype`` calls values that have an order and distances, which a category for each would lose.
QUANTITIES = ("date", "time", "period", "decimal", "complex")


@dataclass
class Encoder:
    """Columns, levels, labels, groups and scales of the first rows, so that later ones are encoded alike.

    Attributes:
        append_sensitive: Add the group as columns (one-hot without the first level) unless X has such a column.
        labels: Label values in code order.
        groups: Group values in code order.
    """

    append_sensitive: bool = False

    def fit_encode(self, x: Any, y: Any, a: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Learn columns, levels, labels, groups and scales; then as :meth:`encode`.

        Raises:
            ValueError: An input cannot be used; the text names the column or the value.
        """
        frame, labels, groups = _read(x, y, a)
        self.columns = list(frame.columns)
        self.levels = [_levels(column, name) for name, column in frame.items()]
        self.labels, self.groups = values_of(labels), values_of(groups)
        _check_values(labels, self.labels, "y", "a classifier needs two labels")
        _check_values(groups, self.groups, "sensitive_features", "fairness between groups needs two groups")
        table, codes = self._table(frame), codes_of(groups, self.groups, "sensitive_features")
        self._one_hot = _one_hot(self.levels) if self.columns else None
        if self._one_hot is not None:
            with joblib.parallel_config("sequential"):
                self._one_hot.fit(table)
        numbers = self._numbers(table)
        self._appended = self._groups_to_append(numbers, codes)
        numbers = self._with_groups(numbers, codes)
        largest = np.abs(numbers).max(0)
        # Squares of such numbers overflow, or vanish.
        self._unit = np.where((largest > 1e100) | ((largest < 1e-100) & (largest > 0)), largest, 1.0)
        self._scaler = StandardScaler().fit(numbers / self._unit)
        return self._scaler.transform(numbers / self._unit), codes_of(labels, self.labels, "y"), codes

    def encode(self, x: Any, y: Any, a: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Columns (R, d) float64, shifted and scaled; label codes; group codes.

        Raises:
            ValueError: As :meth:`fit_encode`, and for values that it did not see.
        """
        frame, labels, groups = _read(x, y, a)
        if list(frame.columns) != self.columns:
            raise ValueError(f"X has the columns {list(frame.columns)}, but the first rows had {self.columns}")
        codes = codes_of(groups, self.groups, "sensitive_features")
        numbers = self._with_groups(self._numbers(self._table(frame)), codes)
        return self._scaler.transform(numbers / self._unit), codes_of(labels, self.labels, "y"), codes

    def _table(self, frame: pd.DataFrame) -> NDArray[Any]:
        """(R, columns) float64: numbers, and codes of categories."""
        if not any(self.levels) and all(map(_is_number, frame.dtypes)):
            whole: NDArray[Any] = frame.to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isfinite(whole).all():
                return whole
        columns = [
            _finite(column, name) if levels is None else _level_codes(column, levels, name)
            for (name, column), levels in zip(frame.items(), self.levels, strict=True)
        ]
        return np.column_stack([np.zeros((len(frame), 0)), *columns])

    def _numbers(self, table: NDArray[Any]) -> NDArray[Any]:
        if self._one_hot is None:
            return table
        with joblib.parallel_config("sequential"):  # or a cluster's workers would start for this
            numbers: NDArray[Any] = self._one_hot.transform(table)
        return numbers

    def _groups_to_append(self, numbers: NDArray[Any], codes: NDArray[Any]) -> list[int]:
        if not self.append_sensitive:
            return []
        wanted = range(1, len(self.groups))
        return [code for code in wanted if not any(_same_split(column, codes == code) for column in numbers.T)]

    def _with_groups(self, numbers: NDArray[Any], codes: NDArray[Any]) -> NDArray[Any]:
        return np.column_stack([numbers, *(codes == code for code in self._appended)]).astype(np.float64)


def _one_hot(levels: list[list[Any] | None]) -> ColumnTransformer:
    """Codes to columns without that of the first level, in the order of the columns; numbers stay."""
    parts = []
    for is_number, run in groupby(range(len(levels)), key=lambda place: levels[place] is None):
        places = list(run)
        sizes = [0 if is_number else len(levels[place] or ()) for place in places]
        encoder = OneHotEncoder(categories=[np.arange(n) for n in sizes], drop="first", sparse_output=False)
        parts.append((str(places[0]), "passthrough" if is_number else encoder, places))
    return ColumnTransformer(parts)


def _check_values(series: pd.Series[Any], found: list[Any], name: str, need: str) -> None:
    if len(found) < 2:
        raise ValueError(f"{name} has only the value {found[0]!r} -> {need}")
    fractions = pd.api.types.is_float_dtype(series) and bool((series % 1 != 0).any())
    if fractions and len(found) > MOST_VALUES:
        looks = "regression -> FLEA is for classification" if name == "y" else "a measurement -> FLEA compares groups"
        raise ValueError(
            f"{name} has {len(found)} different numbers with fractions, which looks like {looks}; cut it into classes"
        )


def _same_split(column: NDArray[Any], member: NDArray[Any]) -> bool:
    """True if ``column`` takes two values, one for members and one for the others."""
    inside, outside = column[member], column[~member]
    return bool((inside == inside[0]).all() and (outside == outside[0]).all() and inside[0] != outside[0])


def _read(x: Any, y: Any, a: Any) -> tuple[pd.DataFrame, pd.Series[Any], pd.Series[Any]]:
    frame, labels, groups = frame_of(x), column_of(y, "y"), column_of(a, "sensitive_features")
    same_length(X=frame, y=labels, sensitive_features=groups)
    return frame, labels, groups


def _is_number(column: Any) -> bool:
    """True for a column, or its dtype, of real numbers."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)


def _levels(column: pd.Series[Any], name: Any) -> list[Any] | None:
    """Levels of a text or categorical column, the last one None if values are missing; None for numbers."""
    if _is_number(column):
        return None
    kind = pd.api.types.infer_dtype(column)
    if kind.startswith(QUANTITIES):
        raise ValueError(f"column {name!r} of X holds {kind} values of type {column.dtype} -> turn it into numbers")
    try:
        levels = values_of(column.dropna()) + [None] * bool(column.isna().any())
    except TypeError as error:
        raise ValueError(f"column {name!r} of X holds neither numbers nor text ({error}) -> leave it out") from error
    if len(levels) > MOST_LEVELS:
        raise ValueError(
            f"column {name!r} of X is text with {len(levels)} different values, which looks like an identifier -> "
            "leave it out, or encode it"
        )
    return levels


def _level_codes(column: pd.Series[Any], levels: list[Any], name: Any) -> NDArray[Any]:
    known, missing = [level for level in levels if level is not None], column.isna().to_numpy()
    if missing.any() and len(known) == len(levels):
        raise ValueError(f"column {name!r} of X has missing values, which the first rows had not -> fill them in")
    codes = np.full(len(column), len(known))
    codes[~missing] = codes_of(column[~missing].astype(object), known, f"column {name!r} of X")
    return codes


def _finite(column: pd.Series[Any], name: Any) -> NDArray[Any]:
    if not _is_number(column):
        raise ValueError(f"column {name!r} of X held numbers before, and is of type {column.dtype} now")
    numbers: NDArray[Any] = column.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        raise ValueError(
            f"column {name!r} of X has {int(wrong.sum())} missing or infinite numbers, the first in row "
            f"{int(wrong.argmax())} -> fill them in, or leave these rows out"
        )
    return numbers
