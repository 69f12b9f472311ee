"""The report as one HTML page that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from groundwire.display import is_numeric, show, show_column
from groundwire.records import Finding, Section, Severity, Table
from groundwire.services.report.figures import svg

if TYPE_CHECKING:
    from markupsafe import Markup

#: Symbol and rank of each severity: colour alone does not tell them apart.
SEVERITIES: dict[Severity, str] = {"fail": "✕", "warn": "!", "info": "i"}
RANK = {name: rank for rank, name in enumerate(SEVERITIES)}
#: More remarks of one plugin than these are folded: they would push its section, and other plugins, out of sight.
MANY = 8


class NoPageError(ImportError):
    """The libraries that draw pages are not installed."""


@dataclass(frozen=True)
class Entry:
    """The latest finding of one plugin, code and stage, and the earlier ones, newest first."""

    latest: Finding
    history: Sequence[Finding]


@dataclass(frozen=True)
class Block:
    """The part of the page about one plugin."""

    plugin: str
    entries: Sequence[Entry]
    sections: Sequence[Section]

    @property
    def shown(self) -> list[Entry]:
        """Entries seen at once: all that is not "info", and that too if it is not much."""
        return [entry for entry in self.entries if entry not in self.folded]

    @property
    def folded(self) -> list[Entry]:
        """Entries that are folded, because it is much and nothing is wrong with it."""
        remarks = [entry for entry in self.entries if entry.latest.severity == "info"]
        return remarks if len(remarks) > MANY else []


def render(meta: Mapping[str, Any], findings: Sequence[Finding], sections: Sequence[tuple[str, Section]]) -> str:
    """Return the page.

    Args:
        meta: What the run was; ``module`` becomes the heading.
        findings: All findings, with plain values.
        sections: ``(plugin, Section)`` pairs. A figure that cannot be drawn becomes a note that says why.

    Raises:
        NoPageError: Jinja2 is not installed.

    Example:
        >>> "Nothing was reported" in render({}, [], [])
        True
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise NoPageError(
            'findings.json is written, its page is not: that needs pip install "groundwire[report]"'
        ) from error

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"show": show, "columns": columns, "paragraphs": paragraphs, "draw": _Drawer()}
    here = files("groundwire.services.report")
    blocks = arrange(findings, sections)
    latest = [entry.latest.severity for block in blocks for entry in block.entries]
    return environment.from_string(here.joinpath("page.html").read_text("utf-8")).render(
        css=here.joinpath("page.css").read_text("utf-8"),
        module=meta.get("module") or "Run",
        facts=_facts(meta),
        blocks=blocks,
        counts={name: latest.count(name) for name in SEVERITIES},
        earlier=len(findings) - len(latest),
        symbols=SEVERITIES,
    )


def arrange(findings: Sequence[Finding], sections: Sequence[tuple[str, Section]]) -> list[Block]:
    """Group by plugin, in order of appearance; within one, the worst findings come first.

    Example:
        >>> old = Finding("mine", "bound", "info", 1.0, "Bound.", epoch=0)
        >>> new = Finding("mine", "bound", "info", 0.9, "Bound.", epoch=1)
        >>> arrange([new, old], [])[0].entries[0].latest.value
        0.9
    """
    plugins = dict.fromkeys([finding.plugin for finding in findings] + [plugin for plugin, _ in sections])
    return [
        Block(
            plugin,
            _entries([finding for finding in findings if finding.plugin == plugin]),
            [section for owner, section in sections if owner == plugin],
        )
        for plugin in plugins
    ]


def columns(table: Table) -> list[tuple[str, bool, list[str]]]:
    """Return title, numeric or not, and cell texts of each column; short rows are filled with empty cells.

    Example:
        >>> columns(Table("", ("model", "acc"), [("dense", 0.9)]))
        [('model', False, ['dense']), ('acc', True, ['0.9000'])]
    """
    width = max([len(table.columns), *(len(row) for row in table.rows)])
    titles = [*map(str, table.columns), *[""] * (width - len(table.columns))]
    cells = [[row[i] if i < len(row) else None for row in table.rows] for i in range(width)]
    return [(title, is_numeric(column), show_column(column)) for title, column in zip(titles, cells, strict=True)]


def paragraphs(text: str) -> list[str]:
    """Split text at blank lines.

    Example:
        >>> paragraphs("One." + chr(10) * 2 + "Two.")
        ['One.', 'Two.']
    """
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _facts(meta: Mapping[str, Any]) -> dict[str, Any]:
    times = ("created", "updated")
    first = {name: value for name, value in meta.items() if name not in ("module", *times)}
    return first | {name: meta[name] for name in times if name in meta}


def _entries(findings: Sequence[Finding]) -> list[Entry]:
    groups: dict[tuple[str, str | None], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.stage), []).append(finding)
    # A finding without an epoch is about the whole run, so it is the newest.
    newest_first = partial(sorted, key=lambda finding: (finding.epoch is None, finding.epoch or 0), reverse=True)
    entries = [Entry(latest, history) for latest, *history in map(newest_first, groups.values())]
    return sorted(entries, key=lambda entry: RANK[entry.latest.severity])


class _Drawer:
    """Draws figures with ids that are unique on one page."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, figure: Any, name: str) -> Markup | str:
        from markupsafe import Markup

        self.count += 1
        try:
            return Markup(svg(figure, f"fig{self.count}-", name))
        except Exception as error:  # one plugin's figure must never cost the report
            note = '<p class="note" role="note">This figure could not be drawn: {}: {}</p>'
            return Markup(note).format(type(error).__name__, error)
