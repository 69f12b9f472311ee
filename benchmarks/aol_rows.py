"""One figure of the benchmark of AOL, with a target that may be a floor or a ceiling."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """Its values, one per repeat or seed; ``target`` bounds their median (or what ``by`` says) from above or below."""

    what: str
    unit: str
    values: Sequence[float]
    target: float | None = None
    at_least: bool = False
    by: str = "median"
    note: str = ""

    @property
    def median(self) -> float:
        return {"median": statistics.median, "mean": statistics.fmean, "min": min, "max": max}[self.by](self.values)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.median >= self.target if self.at_least else self.median <= self.target


def show(figures: Iterable[Figure]) -> None:
    table = Table("measured", "by", "value", "min", "max", "unit", "target", "met", "note")
    for column in table.columns[2:5]:
        column.justify = "right"
    for f in figures:
        numbers = (f"{v:.4g}" for v in (f.median, min(f.values), max(f.values)))
        target = "" if f.target is None else f"{'>=' if f.at_least else '<='} {f.target:g}"
        table.add_row(f.what, f.by, *numbers, f.unit, target, {None: "", True: "yes", False: "NO"}[f.met], f.note)
    Console(width=180).print(table)
