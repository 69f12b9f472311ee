"""The table in the documentation says what the tests of the programs say."""

from pathlib import Path

import pytest
from programs_harness import Refused, Works
from programs_list import NOT_REPLAYED, PROGRAMS, WRONG_TODAY

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
WORDS = {"works": Works, "refused": Refused, "—": type(None)}


def table():
    """The cells of the page, by program and column."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_it_has_every_program():
    assert list(table()) == list(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_cells_are_what_was_found(name):
    program = PROGRAMS[name]
    for plugin, cell in table()[name].items():
        default = None if plugin == "replay" and name in NOT_REPLAYED else Works()
        expected = type(program.plugins.get(plugin, default))
        if (name, plugin) in WRONG_TODAY:
            assert cell.startswith("not yet: "), (plugin, cell)
        else:
            assert WORDS[cell.partition(":")[0]] is expected, (plugin, cell)
