"""Checks of what a user passes to a constructor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless ``value`` is in ``allowed``.

    Raises:
        ValueError: With the choices.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def whole(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``.

    Raises:
        ValueError: With the bound.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
