"""Columns of labels and predictions as people have them: arrays, zeros and ones, real numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def array(values: Any, what: str) -> NDArray[Any]:
    """``values`` as a NumPy array: tensors, frames, series and lists.

    Raises:
        ValueError: It is empty or holds NaN; the text says how many and where the first is.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.dtype.is_floating_point and values.element_size() < 4 else values).numpy()
    found = np.asarray(values)
    found = _inferred(found) if found.dtype == object and found.ndim in (1, 2) else found
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim not in (1, 2):
        raise ValueError(f"{what} must have one or two dimensions, got shape {found.shape}")
    if not len(found):
        raise ValueError(f"{what} is empty")
    missing = _missing(found)
    if missing is not None:
        raise ValueError(f"{what} has {missing.sum()} missing values (NaN or None), the first in row "
                         f"{int(np.argmax(missing))} -> drop or fill these rows before the audit")  # fmt: skip
    return found


def _inferred(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers and truth values that a column of objects holds; anything else as it is."""
    found = pd.DataFrame(values).infer_objects().to_numpy()
    return values if found.dtype.kind not in "biuf" else found.reshape(values.shape)


def _missing(values: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Rows with a missing value, or None if there is none; one cheap look where that suffices."""
    if values.dtype.kind in "biu" or (values.dtype.kind == "f" and not np.isnan(np.min(values))):
        return None
    missing = np.asarray(pd.isna(values))
    rows = missing.any(axis=1) if missing.ndim == 2 else missing
    return np.asarray(rows, bool) if rows.any() else None


def real(values: NDArray[Any], what: str) -> NDArray[np.float64]:
    """One finite number a row.

    Raises:
        ValueError: It is something else.
    """
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ValueError(f"regression needs one number a row, {what} has shape {values.shape} and type {values.dtype}")
    real = values.astype(np.float64)
    if not np.isfinite(real).all():
        raise ValueError(f"{what} has infinite values")
    return real


def zero_one(values: NDArray[Any], what: str, pos_label: Any) -> NDArray[np.uint8]:
    """Binary labels as 0 and 1.

    Raises:
        ValueError: They have more than two values, or two of which it is unknown which is the positive one.

    Example:
        >>> zero_one(np.array([-1, 1]), "y_true", None).tolist(), zero_one(np.array(["n", "y"]), "y_true", "y").tolist()
        ([0, 1], [0, 1])
    """
    if values.dtype == bool and pos_label is None:
        return values.view(np.uint8)
    if pos_label is not None:
        found = pd.unique(values.ravel())
        if len(found) > 2 or (len(found) == 2 and pos_label not in list(found)):
            raise ValueError(f"{what} has the labels {_some(found)}, and pos_label is {pos_label!r}")
        return np.asarray(values == pos_label).astype(np.uint8)
    if values.dtype.kind in "iuf":
        low, high = values.min(), values.max()
        bits = values.astype(np.uint8) if low >= 0 and high <= 1 else None
        if bits is not None and (values.dtype.kind != "f" or bool((bits == values).all())):
            return bits
        if low == -1 and high <= 1 and not (values == 0).any():
            return (values > 0).astype(np.uint8)
    raise ValueError(
        f"{what} must be 0/1, -1/1 or bool for a binary task, got {_some(pd.unique(values.ravel()))} "
        "-> pass pos_label=..., or task='multiclass' or 'regression'"
    )


def _some(values: Any) -> str:
    listed = [v.item() if hasattr(v, "item") else v for v in values[:5]]
    return f"{listed}{' and more' if len(values) > 5 else ''}"
