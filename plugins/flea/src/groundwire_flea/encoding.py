"""From what users have (arrays, data frames, tensors) to numbers, or a clear refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from groundwire_flea.functional import Array

#: A text column of more different values is taken for an identifier.
MOST_LEVELS = 50
#: Numbers with a fraction and more different values are taken for a regression target.
MOST_LABELS = 20


def frame_of(x: Any) -> pd.DataFrame:
    """``X`` as a data frame.

    Raises:
        ValueError: It is not a table of two dimensions.
    """
    if isinstance(x, pd.DataFrame):
        return x
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().float().numpy() if x.dtype == torch.bfloat16 else x.detach().cpu().numpy()
    if hasattr(x, "toarray"):
        x = x.toarray()
    array = np.asarray(x)
    if array.ndim != 2:
        raise ValueError(
            f"X must have two dimensions (rows, columns), got shape {array.shape} -> flatten it, or give embed= to FLEA"
        )
    frame = pd.DataFrame(array)
    return frame.infer_objects() if array.dtype == object else frame


def column_of(values: Any, name: str) -> pd.Series[Any]:
    """A 1-D input as a series without an index; several columns are joined to one, as intersections.

    Raises:
        ValueError: It has more than one dimension without being a data frame, or a value is missing.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, pd.DataFrame):
        joined = values.iloc[:, 0] if values.shape[1] == 1 else values.astype(str).agg(", ".join, axis=1)
        missing = values.isna().any(axis=1).to_numpy()
        series = joined.reset_index(drop=True)
    else:
        array = np.asarray(values, dtype=object if isinstance(values, list | tuple) else None)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got shape {array.shape} -> give one value for each row")
        series = pd.Series(array).infer_objects()
        missing = series.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"{name} has {int(missing.sum())} missing values, the first in row {int(missing.argmax())} -> "
            "fill them in, or leave these rows out"
        )
    return series


def codes_of(series: pd.Series[Any], known: Sequence[Any], name: str) -> Array:
    """The place of each value in ``known``.

    Raises:
        ValueError: A value is not among them.
    """
    codes: Array = pd.Index(known).get_indexer(series)
    if (codes < 0).any():
        strange = sorted({repr(plain(v)) for v in series[codes < 0]})
        raise ValueError(
            f"{name} has the unknown values {', '.join(strange[:5])}; known are {', '.join(map(repr, known))} -> "
            "map them to known ones, or fit again with all rows"
        )
    return codes


def values_of(series: pd.Series[Any]) -> list[Any]:
    """Different values in order: of their size where they can be compared, else of their text."""
    found = [plain(v) for v in series.unique()]
    try:
        return sorted(found)
    except TypeError:
        return sorted(found, key=repr)


def plain(value: Any) -> Any:
    """A NumPy scalar as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


@dataclass
class Encoder:
    """What was learned from the first rows, so that later ones are encoded alike.

    Attributes:
        append_sensitive: Add the group as columns (one-hot without the first level) unless X has such a column.
        labels: Label values in code order.
        groups: Group values in code order.
    """

    append_sensitive: bool = False

    def fit_encode(self, x: Any, y: Any, a: Any) -> tuple[Array, Array, Array]:
        """Learn columns, levels, labels, groups and scales; then as :meth:`encode`.

        Raises:
            ValueError: An input cannot be used; the text names the column or the value.
        """
        frame, labels, groups = _read(x, y, a)
        self.columns = list(frame.columns)
        self.levels = [_levels(column, name) for name, column in frame.items()]
        self.labels, self.groups = values_of(labels), values_of(groups)
        self._check_labels(labels)
        if len(self.groups) < 2:
            raise ValueError(
                f"sensitive_features has only the value {self.groups[0]!r} -> fairness between groups needs two groups"
            )
        numbers, codes = self._numbers(frame), codes_of(groups, self.groups, "sensitive_features")
        self.appended = self._to_append(numbers, codes)
        numbers = self._with_groups(numbers, codes)
        self.shift, scale = numbers.mean(0), numbers.std(0)
        self.scale = np.where(scale > 0, scale, 1.0)
        return (numbers - self.shift) / self.scale, codes_of(labels, self.labels, "y"), codes

    def encode(self, x: Any, y: Any, a: Any) -> tuple[Array, Array, Array]:
        """Columns (R, d) float64, shifted and scaled; label codes; group codes.

        Raises:
            ValueError: As :meth:`fit_encode`, and for values that it did not see.
        """
        frame, labels, groups = _read(x, y, a)
        if list(frame.columns) != self.columns:
            raise ValueError(f"X has the columns {list(frame.columns)}, but the first rows had {self.columns}")
        codes = codes_of(groups, self.groups, "sensitive_features")
        numbers = self._with_groups(self._numbers(frame), codes)
        return (numbers - self.shift) / self.scale, codes_of(labels, self.labels, "y"), codes

    def _check_labels(self, labels: pd.Series[Any]) -> None:
        if len(self.labels) < 2:
            raise ValueError(f"y has only the value {self.labels[0]!r} -> a classifier needs two labels")
        fractions = pd.api.types.is_float_dtype(labels) and bool((labels % 1 != 0).any())
        if fractions and len(self.labels) > MOST_LABELS:
            raise ValueError(
                f"y has {len(self.labels)} different numbers with fractions, which looks like regression -> "
                "FLEA is for classification; cut y into classes"
            )

    def _numbers(self, frame: pd.DataFrame) -> Array:
        if not any(self.levels) and all(map(_is_number, frame.dtypes)):
            whole: Array = frame.to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isfinite(whole).all():
                return whole
        parts = [
            _one_hot(column, levels, name) if levels is not None else _finite(column, name)[:, None]
            for (name, column), levels in zip(frame.items(), self.levels, strict=True)
        ]
        return np.concatenate([*parts, np.zeros((len(frame), 0))], axis=1)

    def _to_append(self, numbers: Array, codes: Array) -> list[int]:
        if not self.append_sensitive:
            return []
        wanted = range(1, len(self.groups))
        return [code for code in wanted if not any(_same_split(column, codes == code) for column in numbers.T)]

    def _with_groups(self, numbers: Array, codes: Array) -> Array:
        return np.column_stack([numbers, *(codes == code for code in self.appended)]).astype(np.float64)


def same_length(**inputs: Any) -> None:
    """Raise unless all inputs have the same number of rows.

    Raises:
        ValueError: With the numbers of rows of all.

    Example:
        >>> same_length(X=[1, 2], y=[0, 1])
    """
    lengths = {name: len(values) for name, values in inputs.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"the inputs have different numbers of rows ({found}) -> give one value for each row of X")
    if not next(iter(lengths.values())):
        raise ValueError("there are no rows")


def _same_split(column: Array, member: Array) -> bool:
    """Whether ``column`` takes two values, one for members and one for the others."""
    inside, outside = column[member], column[~member]
    return bool((inside == inside[0]).all() and (outside == outside[0]).all() and inside[0] != outside[0])


def _read(x: Any, y: Any, a: Any) -> tuple[pd.DataFrame, pd.Series[Any], pd.Series[Any]]:
    frame, labels, groups = frame_of(x), column_of(y, "y"), column_of(a, "sensitive_features")
    same_length(X=frame, y=labels, sensitive_features=groups)
    return frame, labels, groups


def _is_number(column: Any) -> bool:
    """Whether a column, or its dtype, is of real numbers."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)


def _levels(column: pd.Series[Any], name: Any) -> list[Any] | None:
    """Levels of a text or categorical column, a missing value being one; None for numbers."""
    if _is_number(column):
        return None
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_complex_dtype(column):
        raise ValueError(f"column {name!r} of X is of type {column.dtype} -> turn it into numbers")
    levels = values_of(column.dropna()) + (["missing"] if column.isna().any() else [])
    if len(levels) > MOST_LEVELS:
        raise ValueError(
            f"column {name!r} of X is text with {len(levels)} different values, which looks like an identifier -> "
            "leave it out, or encode it"
        )
    return levels


def _one_hot(column: pd.Series[Any], levels: list[Any], name: Any) -> Array:
    filled = column.astype(object).where(column.notna(), "missing")
    codes = codes_of(filled, levels, f"column {name!r} of X") if levels else np.zeros(len(column), dtype=int)
    return np.eye(max(len(levels), 1))[codes][:, 1:]


def _finite(column: pd.Series[Any], name: Any) -> Array:
    if not _is_number(column):
        raise ValueError(f"column {name!r} of X held numbers before, and is of type {column.dtype} now")
    numbers: Array = column.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        raise ValueError(
            f"column {name!r} of X has {int(wrong.sum())} missing or infinite numbers, the first in row "
            f"{int(wrong.argmax())} -> fill them in, or leave these rows out"
        )
    return numbers
