"""Checks of what a user passes: options of constructors, time steps, class counts. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from groundwire_limes.functional import Array


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless ``value`` is in ``allowed``.

    Raises:
        ValueError: With the choices.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``.

    Raises:
        ValueError: With the bound.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def is_number(value: Any) -> bool:
    """Tell whether ``value`` is a number, which True and False are not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def as_time_step(step: Any) -> int:
    """Return ``step`` as an int.

    Raises:
        TypeError: It is not a whole number.
    """
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(f"step must be a whole number, got {step!r}")
    return int(step)


def as_class_counts(counts: Any, classes: int) -> Array:
    """Return ``counts`` as float64 of shape (K,).

    Raises:
        ValueError: Another shape, or a count that is negative, infinite or NaN; it names the class.
    """
    row = np.asarray(counts, np.float64)
    if row.shape != (classes,):
        raise ValueError(f"counts must have shape ({classes},), one per class, got {row.shape}")
    wrong = np.flatnonzero(~(np.isfinite(row) & (row >= 0)))
    if len(wrong):
        raise ValueError(f"the count of class {wrong[0]} is {row[wrong[0]]:g}; counts are finite and at least 0")
    return row
