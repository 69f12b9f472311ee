"""The attributes that an object itself holds, in its ``__dict__`` and in slots, and which objects are looked into."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

#: Values that hold nothing which could be edited.
PLAIN = frozenset(
    {
        bool, int, float, complex, str, bytes, type(None), range, slice, torch.dtype, torch.device, torch.Size,
        types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, property, staticmethod,
        classmethod,
    }
)  # fmt: skip
_CLOSED = (Tensor, nn.Module, np.ndarray, type, types.ModuleType, types.MethodType, Dataset, DataLoader, enum.Enum)
#: Tables keep what they hold in objects of their own, which no one else may copy.
_TABLES = frozenset({"pandas", "polars", "pyarrow"})


class Attributes(MutableMapping[str, Any]):
    """The attributes that ``owner`` itself holds, as a mapping that writes through to it.

    Its class's own ``__setattr__`` is passed by: attributes of frozen objects can be put back too.

    Example:
        >>> class Point:
        ...     __slots__ = ("x", "y")
        >>> point = Point()
        >>> Attributes(point)["x"] = 1
        >>> point.x, list(Attributes(point))
        (1, ['x'])
    """

    def __init__(self, owner: Any) -> None:
        kind: Any = type(owner)
        self._owner, self._slots, self._dict = owner, _slots(kind), getattr(owner, "__dict__", {})

    def __getitem__(self, name: str) -> Any:
        return self._slots[name].__get__(self._owner) if name in self._slots else self._dict[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._slots:
            self._slots[name].__set__(self._owner, value)
        else:
            self._dict[name] = value

    def __delitem__(self, name: str) -> None:
        if name in self._slots:
            self._slots[name].__delete__(self._owner)
        else:
            del self._dict[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._dict
        for name, slot in self._slots.items():
            try:
                slot.__get__(self._owner)
            except AttributeError:
                continue
            yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)


def has_attributes(value: Any) -> bool:
    """Tell whether ``value`` is an object that is a bundle of attributes, not a tensor, module, class or data set.

    Example:
        >>> has_attributes(types.SimpleNamespace(x=1)), has_attributes(1), has_attributes(nn.Linear(1, 1))
        (True, False, False)
    """
    kind: Any = type(value)
    if kind in PLAIN or isinstance(value, _CLOSED):
        return False
    if kind.__module__.partition(".")[0] in _TABLES:
        return False
    return isinstance(getattr(value, "__dict__", None), dict) or bool(_slots(kind))


@functools.cache
def _slots(cls: Hashable) -> dict[str, Any]:
    """Return the descriptors of the slots of ``cls`` and its bases by name."""
    assert isinstance(cls, type)
    return {
        name: slot
        for base in reversed(cls.__mro__)
        if "__slots__" in vars(base)
        for name, slot in vars(base).items()
        if isinstance(slot, types.MemberDescriptorType)
    }
