"""Batches: the fields that core finds in them by itself, and the tensors and containers that they are made of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from groundwire.errors import PluginError
from groundwire.records import Fields

#: Keys by role, the first one present counts.
KEYS = {
    "inputs": ("inputs", "x", "input", "image", "features", "input_ids"),
    "targets": ("targets", "y", "target", "label", "labels"),
    "groups": ("groups", "group", "sensitive"),
    "source": ("source",),
    "time": ("time", "timestamp"),
    "ids": ("ids", "id", "index"),
}


_ROLES = {key: (role, place) for role, keys in KEYS.items() for place, key in enumerate(keys)}


def _from_mapping(batch: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    places: dict[str, int] = {}
    for key in batch:
        role, place = _ROLES.get(key, (None, 0))
        if role is not None and place <= places.get(role, place):
            found[role], places[role] = batch[key], place
    return found


def default_fields(batch: Any) -> Fields | None:
    """Return the fields of a tensor, ``(x,)``, ``(x, y)``, ``(x, y, meta dict)`` or a mapping with the usual keys.

    Returns:
        None if the batch is of another shape.

    Example:
        >>> default_fields({"image": 1, "label": 2, "group": 3})
        Fields(inputs=1, targets=2, groups=3, source=None, time=None, ids=None)
        >>> default_fields((1, 2, {"time": 5})).time
        5
    """
    if isinstance(batch, Mapping):
        found = _from_mapping(batch)
        return Fields(**found) if "inputs" in found else None
    if not isinstance(batch, list | tuple):
        return Fields(batch) if hasattr(batch, "shape") else None
    if len(batch) == 3 and isinstance(batch[2], Mapping):
        return Fields(**{**_from_mapping(batch[2]), "inputs": batch[0], "targets": batch[1]})
    return Fields(*batch) if 1 <= len(batch) <= 2 else None


def unknown_batch(batch: Any) -> PluginError:
    """Return the error for a batch that nobody can read."""
    shape = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
    if isinstance(batch, list | tuple):
        shape += f" of {len(batch)}"
    return PluginError(
        f"cannot tell what this batch holds ({shape}) -> pass Plugins(fields=lambda batch: Fields(...)) or implement "
        "gw_fields on the LightningModule or DataModule"
    )


def copy_containers(value: Any) -> Any:
    """Return a copy of nested lists, tuples, dicts and dataclasses that shares every leaf.

    Example:
        >>> batch = {"x": [1, 2]}
        >>> twin = copy_containers(batch)
        >>> batch.pop("x"), twin
        ([1, 2], {'x': [1, 2]})
    """
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = copy_containers(item)
        return twin
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copy_containers, value))
    if type(value) in (list, tuple):
        return type(value)(map(copy_containers, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _copy_dataclass(value)
    return value


def _copy_dataclass(value: Any) -> Any:
    twin = copy.copy(value)
    for item in dataclasses.fields(value):
        if hasattr(value, item.name):
            object.__setattr__(twin, item.name, copy_containers(getattr(value, item.name)))
    return twin


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers.

    Example:
        >>> import torch
        >>> len(list(tensors_in([torch.zeros(1), {"y": torch.zeros(2)}])))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, f.name, None) for f in dataclasses.fields(value)])
