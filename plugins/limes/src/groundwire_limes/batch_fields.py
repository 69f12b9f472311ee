"""Parts of a batch that are known for each row: its time, its weight, and how many rows there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from groundwire import Fields, PluginError
from groundwire.batch import tensors_in


def find_in_batch(key: str | Callable[[Any], Any], batch: Any, fields: Fields) -> Any:
    """Return a callable's answer, the entry ``key`` of the batch or of a dict in it, or the time field.

    Returns:
        None if there is nothing.

    Example:
        >>> find_in_batch("when", ([0.0], [1], {"when": 7}), Fields(None))
        7
        >>> find_in_batch("timestamp", None, Fields(None, time=7))
        7
    """
    if callable(key):
        return key(batch)
    for part in [batch, *(batch if isinstance(batch, list | tuple) else ())]:
        if isinstance(part, Mapping) and key in part:
            return part[key]
    return fields.time if key in ("time", "timestamp") else None


def number_of_rows(fields: Fields) -> int:
    """Return the number of rows of a batch.

    Raises:
        PluginError: Neither targets nor inputs tell.
    """
    for value in (fields.targets, fields.inputs):
        for tensor in tensors_in(value):
            if tensor.dim():
                return len(tensor)
    raise PluginError("limes: cannot tell how many rows this batch has -> Plugins(fields=...) with tensor targets")


def row_weights(key: str | Callable[[Any], Any] | None, batch: Any, rows: int) -> Tensor | None:
    """Return the weight of each row of a batch in the counts, shape (B,); None if all are 1.

    Args:
        key: A key of the batch, or ``key(batch)``; None for no weights.
        batch: As the loader gave it.
        rows: B.

    Raises:
        PluginError: They are not there or not as many as rows, or one is negative or not finite.
    """
    if key is None:
        return None
    found = find_in_batch(key, batch, Fields(None))
    if found is None:
        raise PluginError(f"limes: no weights {key!r} in a training batch -> LIMES(weights='their key')")
    weights = torch.as_tensor(found).reshape(-1)
    if len(weights) != rows:
        raise PluginError(f"limes: {len(weights)} weights for a batch of {rows} rows -> one for each")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise PluginError("limes: a row's weight is negative or not finite -> weights are at least 0")
    return weights
