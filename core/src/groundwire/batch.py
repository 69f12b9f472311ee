"""Batches: the fields that core finds in them by itself, and the tensors and containers that they are made of."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from groundwire.attributes import PLAIN, Attributes, has_attributes
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

_CONTAINERS = (list, dict, set, deque)
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


def copy_containers(value: Any, shared: list[Any] | None = None) -> Any:
    """Return a copy of nested containers, and of objects that hold attributes, which shares every tensor.

    Copied are lists, tuples, dicts, sets, deques and subclasses of theirs, NumPy arrays, dataclasses, and other objects
    of any class with attributes or slots. Shared are tensors, modules, data sets, and what does not let itself be
    copied.

    Args:
        value: A batch.
        shared: Receives the objects that could not be copied, though they may be edited.

    Example:
        >>> batch = {"x": [1, 2]}
        >>> twin = copy_containers(batch)
        >>> batch.pop("x"), twin
        ([1, 2], {'x': [1, 2]})
    """
    return _copied(value, {}, [] if shared is None else shared)


def _copied(value: Any, known: dict[int, Any], shared: list[Any]) -> Any:
    """Return the copy of ``value``; ``known`` has the one of each object, of which a batch may hold one twice."""
    if type(value) in PLAIN or isinstance(value, Tensor):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple):
        return _copied_tuple(value, known, shared)
    if not (isinstance(value, _CONTAINERS) or has_attributes(value)):
        return value
    twin = known[id(value)] = _twin(value)
    if twin is value:
        shared.append(value)
        return value
    if isinstance(twin, dict):
        for key, item in value.items():
            twin[key] = _copied(item, known, shared)
    elif isinstance(twin, list | deque):
        for place, item in enumerate(value):
            twin[place] = _copied(item, known, shared)
    if has_attributes(twin):
        attributes = Attributes(twin)
        for name, item in list(attributes.items()):
            attributes[name] = _copied(item, known, shared)
    return twin


def _copied_tuple(value: Any, known: dict[int, Any], shared: list[Any]) -> Any:
    items = [_copied(item, known, shared) for item in value]
    if type(value) is tuple:
        return tuple(items)
    try:
        # Past the constructor, which may take other arguments than the items.
        twin = tuple.__new__(type(value), items)
    except TypeError:
        return value
    for name, item in getattr(value, "__dict__", {}).items():
        vars(twin)[name] = _copied(item, known, shared)
    return twin


def _twin(value: Any) -> Any:
    """Return a shallow copy of ``value``, or ``value`` itself if it does not let itself be copied."""
    cls: Any = type(value)
    base: Any = object
    reduces = cls.__reduce_ex__ is not base.__reduce_ex__ or cls.__reduce__ is not base.__reduce__
    try:
        if reduces or hasattr(cls, "__copy__") or isinstance(value, _CONTAINERS):
            twin = copy.copy(value)
        else:
            # Past ``__getstate__``, which may write an image into a string.
            twin = object.__new__(cls)
            Attributes(twin).update(Attributes(value))
    except Exception:
        return value
    return twin if type(twin) is cls else value


def contents(value: Any) -> dict[Any, Any]:
    """Return what a container or an object holds, by key, place or attribute.

    Example:
        >>> contents(["a"]), contents({"x": 1})
        ({0: 'a'}, {'x': 1})
    """
    found: dict[Any, Any] = {}
    if isinstance(value, dict):
        found.update(value)
    elif isinstance(value, list | tuple | deque):
        found.update(enumerate(value))
    if has_attributes(value):
        found.update(Attributes(value))
    return found


def parts_of(value: Any, owner: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield ``value`` and everything nested in it, each once, with the class of the object that holds it.

    Example:
        >>> [part for _, part in parts_of({"x": [1]})]
        [{'x': [1]}, [1], 1]
    """
    stack, seen = [(owner, value)], set()
    while stack:
        owner, part = stack.pop()
        yield owner, part
        if type(part) in PLAIN or isinstance(part, Tensor) or id(part) in seen:
            continue
        seen.add(id(part))
        if has_attributes(part):
            owner = type(part).__name__
        stack += [(owner, item) for item in reversed(contents(part).values())]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers and objects.

    Example:
        >>> import torch
        >>> len(list(tensors_in([torch.zeros(1), {"y": torch.zeros(2)}])))
        2
    """
    return (part for _, part in parts_of(value) if isinstance(part, Tensor))
