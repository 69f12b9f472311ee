"""Plain values: what plugins hand over turned into what JSON and ``torch.load(weights_only=True)`` can hold.

JSON has no NaN and no infinities. They are written as ``{"$float": "nan"}``, ``"inf"`` or ``"-inf"``, so that the file
is valid for every reader and a string ``"nan"`` stays a string.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

TAG = "$float"


def plain(value: Any) -> Any:
    """Return ``value`` as None, bool, int, float, str, or a list or dict of these.

    Args:
        value: Also tensors, NumPy arrays and NumPy scalars (anything with ``tolist``), tuples, and dicts whose keys are
            scalars; keys become strings.

    Raises:
        TypeError: ``value`` is or holds anything else.

    Example:
        >>> import torch
        >>> plain({0: torch.tensor([0.5, 1.0]), 1: (True, None)})
        {'0': [0.5, 1.0], '1': [True, None]}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)  # `str()` of an enum gives its name, not its value
    if isinstance(value, Mapping):
        return _plain_dict(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} is not a plain value")


def is_plain(value: Any) -> bool:
    """Tell whether ``value`` is None, bool, int, float, str, or a list, tuple or string-keyed dict of these."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def plain_or_repr(value: Any) -> Any:
    """Return ``value`` in plain types; what is not plain becomes its ``repr``, so that a save never fails for it.

    Example:
        >>> plain_or_repr({"rho": (0.5, None), "loss": print})
        {'rho': [0.5, None], 'loss': '<built-in function print>'}
    """
    if isinstance(value, Mapping):
        return {str(k): plain_or_repr(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_or_repr(v) for v in value]
    return value if is_plain(value) else repr(value)


def dumps(value: Any) -> str:
    """Return plain ``value`` as strict JSON, with non-finite floats tagged.

    Example:
        >>> dumps([float("nan")]).split()
        ['[', '{', '"$float":', '"nan"', '}', ']']
    """
    return json.dumps(_tagged(value), indent=1, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """Return the value that :func:`dumps` wrote.

    Raises:
        ValueError: ``text`` is not JSON.

    Example:
        >>> loads(dumps({"loss": float("inf")}))
        {'loss': inf}
    """
    return json.loads(text, object_hook=lambda item: float(item[TAG]) if item.keys() == {TAG} else item)


def _plain_dict(value: Mapping[Any, Any]) -> dict[str, Any]:
    result = {}
    for key, item in value.items():
        name = plain(key)
        if isinstance(name, list | dict):
            raise TypeError(f"the dict key {key!r} is not a scalar")
        if name == TAG or str(name) in result:
            raise TypeError(f"the dict key {name!r} is {'reserved' if name == TAG else 'there twice'}")
        try:
            result[str(name)] = plain(item)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
    return result


def _tagged(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: str(value)}
    if isinstance(value, dict):
        return {key: _tagged(item) for key, item in value.items()}
    return [_tagged(item) for item in value] if isinstance(value, list) else value
