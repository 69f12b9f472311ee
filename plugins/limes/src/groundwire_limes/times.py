"""Where in a batch something is that is known for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from groundwire import Fields


def times_of(where: str | Callable[[Any], Any], batch: Any, fields: Fields) -> Any:
    """What ``where`` finds in ``batch``: a callable's answer, a key of the batch or of a dict in it, or the time field.

    Returns:
        None if there is nothing.

    Example:
        >>> times_of("when", ([0.0], [1], {"when": 7}), Fields(None))
        7
        >>> times_of("timestamp", None, Fields(None, time=7))
        7
    """
    if callable(where):
        return where(batch)
    for part in [batch, *(batch if isinstance(batch, list | tuple) else ())]:
        if isinstance(part, Mapping) and where in part:
            return part[where]
    return fields.time if where in ("time", "timestamp") else None
