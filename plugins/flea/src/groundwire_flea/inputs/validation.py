"""Validation of what users give (arrays, data frames, tensors, lists), as tables and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray


def frame_of(x: Any) -> pd.DataFrame:
    """``X`` as a data frame.

    Raises:
        ValueError: It is not a table of two dimensions, or some of it is masked.
    """
    if isinstance(x, pd.DataFrame):
        return x.infer_objects()
    if isinstance(x, torch.Tensor):
        x = array_of(x)
    if hasattr(x, "toarray"):
        x = x.toarray()
    array = _unmasked(x, "X")
    if array.ndim != 2:
        raise ValueError(
            f"X must have two dimensions (rows, columns), got shape {array.shape} -> flatten it, or give embed= to FLEA"
        )
    return pd.DataFrame(array).infer_objects()


def column_of(values: Any, name: str) -> pd.Series[Any]:
    """A 1-D input as a series without an index; several columns are joined to one, as intersections.

    Raises:
        ValueError: It has more than one dimension without being a data frame, or a value is missing.
    """
    if isinstance(values, torch.Tensor):
        values = array_of(values)
    if isinstance(values, pd.DataFrame):
        joined = values.iloc[:, 0] if values.shape[1] == 1 else values.astype(str).agg(", ".join, axis=1)
        missing = values.isna().any(axis=1).to_numpy()
        series = joined.reset_index(drop=True)
    else:
        array = _unmasked(values, name, dtype=object if isinstance(values, list | tuple) else None)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got shape {array.shape} -> give one value for each row")
        series = pd.Series(array).infer_objects()
        missing = series.isna().to_numpy()
        if pd.api.types.is_float_dtype(series):
            missing = missing | np.isinf(series.to_numpy(dtype=float, na_value=np.nan))
    if missing.any():
        raise ValueError(
            f"{name} has {int(missing.sum())} missing or infinite values, the first in row {int(missing.argmax())} -> "
            "fill them in, or leave these rows out"
        )
    return series


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's values in NumPy, which knows neither gradients nor bfloat16, and no layout but a dense one."""
    tensor = tensor.detach().to_dense().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _unmasked(values: Any, name: str, dtype: Any = None) -> NDArray[Any]:
    if np.ma.is_masked(values):  # asarray would take what is under the mask for data
        raise ValueError(
            f"{name} has {int(np.ma.getmaskarray(values).sum())} masked values -> fill them in, or leave them out"
        )
    return np.asarray(values, dtype=dtype)


def codes_of(series: pd.Series[Any], known: Sequence[Any], name: str) -> NDArray[Any]:
    """The place of each value in ``known``.

    Raises:
        ValueError: A value is not among them.
    """
    codes: NDArray[Any] = pd.Index(known).get_indexer(series)
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
