"""Output of the commands: tables and lines in which a hostile name cannot steer the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class CommandError(Exception):
    """Ends a command with one line for its user."""


def clean(text: str) -> str:
    r"""Return ``text`` on one line, without characters that a terminal would obey.

    Example:
        >>> clean("one\ntwo \x1b[31mred")
        'one two �[31mred'
    """
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table of texts.

    Example:
        >>> table(["name"], [["[bold]x"]])
        name
        ───────
        [bold]x
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    cells = [[clean(str(cell)) for cell in row] for row in rows]
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        # On a narrow terminal the text of the last column gives way, not the names in the others.
        words = [len(word) for row in cells for word in row[index].split()]
        grid.add_column(column, min_width=min(20, max(words, default=1)))
    for row in cells:
        grid.add_row(*(Text(cell, overflow="fold") for cell in row))
    _console().print(grid)


def line(text: str) -> None:
    """Print one line, never broken, so that a path can be copied.

    Example:
        >>> line("done")
        done
    """
    _console().print(clean(text), soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    # Names may look like markup, e.g. "[red]".
    return Console(markup=False, highlight=False, emoji=False)
