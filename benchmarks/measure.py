"""Measuring several ways in turn, and showing what came out next to its target."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One result: its values, one per repeat or seed, and what their median (or mean) should be at most (or least)."""

    what: str
    unit: str
    values: Sequence[float]
    target: float | None = None
    at_least: bool = False
    of_mean: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        value = self.mean if self.of_mean else self.median
        return bool(value >= self.target if self.at_least else value <= self.target)


def interleaved(what: str, repeats: int, ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each way returned, repeat by repeat; every other repeat goes backwards, so that a drift hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values() if repeats > 1 else ():
        way()  # The first time is slower for reasons of its own: caches, allocators, lazy imports.
    for repeat in track(range(repeats), what, transient=True):
        for name in list(ways)[:: -1 if repeat % 2 else 1]:
            gc.collect()  # What an earlier repeat left must not be in the way of this one.
            found[name].append(ways[name]())
    return found


def show(rows: Iterable[Row]) -> None:
    table = Table("measured", "median", "mean", "min", "max", "unit", "target", "met")
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in rows:
        numbers = map(short, (row.median, row.mean, min(row.values), max(row.values)))
        sign = (">=" if row.at_least else "<=") + (" mean" if row.of_mean else "")
        target = "" if row.target is None else f"{sign} {row.target:g}"
        table.add_row(row.what, *numbers, row.unit, target, {None: "", True: "yes", False: "NO"}[row.met])
    console = Console()
    # A file or a pipe has no width, and rich would then wrap every name.
    (console if console.is_terminal else Console(width=120)).print(table)


def short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write(path: Path, rows: Iterable[Row], **settings: Any) -> None:
    """All values of all repeats, and what they were measured with."""
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    results = [asdict(row) | {"median": row.median, "mean": row.mean, "met": row.met} for row in rows]
    path.write_text(json.dumps({"settings": settings, "machine": machine, "results": results}, indent=2) + "\n")
