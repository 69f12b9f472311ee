"""Values as text, for reports and the command line: numbers that can be compared down a column, words for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def show(value: Any) -> str:
    """Return a plain value as a short text.

    Example:
        >>> show(0.123456), show(True), show(None), show({"a": [1, 2]})
        ('0.1235', 'yes', '—', 'a: 1, 2')
    """
    if value is None or isinstance(value, bool):
        return {None: "—", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return _number(value, _decimals([value]))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {show(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value)
    return str(value)


def is_numeric(cells: Sequence[Any]) -> bool:
    """Tell whether a column holds numbers, so that it is right aligned; empty cells do not count.

    Example:
        >>> is_numeric([1, None, 2.5]), is_numeric([True, 1]), is_numeric([None])
        (True, False, False)
    """
    held = [cell for cell in cells if cell is not None]
    return bool(held) and all(_is_number(cell) for cell in held)


def show_column(cells: Sequence[Any]) -> list[str]:
    """Return the texts of a column; its numbers share their decimals, so that the points are below each other.

    Example:
        >>> show_column([0.98712, 0.5, None])
        ['0.9871', '0.5000', '—']
        >>> show_column([1200, 35])
        ['1200', '35']
    """
    decimals = _decimals([cell for cell in cells if _is_number(cell)])
    return [_number(cell, decimals) if _is_number(cell) else show(cell) for cell in cells]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decimals(numbers: Sequence[float]) -> int:
    top = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    if 0.01 <= top < 1:
        return 4
    return min(6, max(0, 3 - math.floor(math.log10(top)))) if top > 0 else 1


def _number(value: float, decimals: int) -> str:
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)  # 2026 is more often a year than a count
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "nan")
    # Six decimals at most: below 0.0001 fewer than three digits would be left.
    smallest = 1e-4 if decimals == 6 else 10.0**-decimals
    if value and not smallest <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.{decimals}f}"
