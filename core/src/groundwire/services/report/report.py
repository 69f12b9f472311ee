"""All findings of a run, on disk and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from groundwire.plain import dumps, plain
from groundwire.records import Finding, Section, Table
from groundwire.records import Report as ReportRecord
from groundwire.services.report import store
from groundwire.services.report.page import NoPageError, render

_LOG = logging.getLogger("groundwire.report")
#: Version of the layout of ``findings.json``; a change that old readers would misread raises it.
SCHEMA_VERSION = 1

Key: TypeAlias = tuple[str, str, str | None, int | None]
PluginSection: TypeAlias = tuple[str, Section]


class Report(ReportRecord):
    """The findings of one run, with what the run was and what each plugin has to show.

    Args:
        meta: What the run was, for the head of the page: plain values by name, for example ``module``, ``plugins``,
            ``groundwire``, ``torch``, ``lightning``, ``max_epochs``. ``created`` is filled in when missing, and each
            :meth:`write` sets ``updated`` (ISO 8601, UTC).

    Attributes:
        meta: The mapping above.
        sections: ``(plugin, Section)`` pairs, as last written or read. Figures are kept in the page only.
        path: The page, ``report.html``, once the report was written or read; ``findings.json`` lies next to it, and
            is the path itself where nothing draws pages.

    Raises:
        TypeError: A value in ``meta`` is not plain.

    Example:
        >>> import tempfile
        >>> report = Report({"module": "Net"})
        >>> report.add([Finding("mine", "sparsity", "info", 0.5, "Half is zero.", "validate", epoch=0)])
        >>> report.add([Finding("mine", "sparsity", "info", 0.9, "Most is zero.", "validate", epoch=0)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.write(folder)
        ...     [finding.value for finding in Report.read(folder).findings]
        [0.9]
    """

    def __init__(self, meta: Mapping[str, Any] | None = None) -> None:
        self.meta: dict[str, Any] = {"created": _now()} | _plain("meta of the report", dict(meta or {}))
        self.sections: list[PluginSection] = []
        self.path: Path | None = None
        self._findings: dict[Key, Finding] = {}

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings; one with the plugin, code, stage and epoch of an earlier one takes its place.

        Args:
            findings: Their values may be or hold tensors and NumPy values, which become plain.

        Raises:
            TypeError: A value is not plain; the text names the plugin and the code.
        """
        for finding in findings:
            stored = plain_finding(finding)
            self._findings[stored.plugin, stored.code, stored.stage, stored.epoch] = stored

    @property
    def findings(self) -> list[Finding]:
        """All findings, in the order in which each was first added."""
        return list(self._findings.values())

    def write(self, directory: str | os.PathLike[str], sections: Sequence[PluginSection] = ()) -> None:
        """Write ``findings.json`` and ``report.html`` into ``directory``, which is made when missing.

        Without the libraries of ``groundwire[report]`` there is no page, and one line in the log says so.

        Args:
            directory: Usually ``<log_dir>/groundwire``.
            sections: What the plugins show. A plugin that is here replaces its earlier sections; others keep theirs,
                without figures.

        Raises:
            TypeError: A table holds a value that is not plain. A figure that cannot be drawn becomes a note instead.
        """
        folder = Path(directory)
        new = {plugin for plugin, _ in sections}
        pairs = [pair for pair in self.sections if pair[0] not in new] + [_plain_section(*pair) for pair in sections]
        self.meta["updated"] = _now()
        try:
            page = render(self.meta, self.findings, pairs)
        except NoPageError as error:
            _LOG.warning("%s", error)
            page = None
        self.sections = [(plugin, replace(section, figures=())) for plugin, section in pairs]
        folder.mkdir(parents=True, exist_ok=True)
        store.write(folder / store.FINDINGS, dumps(self._content()))
        if page is not None:
            store.write(folder / store.PAGE, page)
        self.path = folder / (store.FINDINGS if page is None else store.PAGE)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report back.

        Args:
            path: The run's ``log_dir``, the ``groundwire`` folder in it, or its ``findings.json``.

        Raises:
            FileNotFoundError: There is no report; the text lists what was looked for.
            ValueError: The file is damaged, is no report, or was written by a newer groundwire.
        """
        file = store.locate(path)
        content = store.read(file, SCHEMA_VERSION)
        try:
            report = cls(content["meta"])
            report.add(Finding(**item) for item in content["findings"])
            report.sections = [_section(**item) for item in content["sections"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error!r}. Run again to write a new one.") from error
        page = file.with_name(store.PAGE)
        report.path = page if page.exists() else file
        return report

    def _content(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "meta": self.meta,
            "findings": [asdict(finding) for finding in self.findings],
            "sections": [
                {"plugin": plugin, "title": part.title, "text": part.text, "tables": [asdict(t) for t in part.tables]}
                for plugin, part in self.sections
            ],
        }


def plain_finding(finding: Finding) -> Finding:
    """Return ``finding`` with a value that can be stored: a tensor or a NumPy value becomes a number or a list.

    Raises:
        TypeError: The value is not plain; the text names the plugin and the code.

    Example:
        >>> import torch
        >>> plain_finding(Finding("sam", "norm", "info", torch.tensor(0.5), "Of the gradient.")).value
        0.5
    """
    return Finding(**_plain(f"finding {finding.code!r} of {finding.plugin}", vars(finding)))


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _plain(what: str, value: Any) -> Any:
    try:
        return plain(value)
    except TypeError as error:
        raise TypeError(f"The {what} cannot be stored: {error}.") from error


def _plain_section(plugin: str, section: Section) -> PluginSection:
    what = f"section {section.title!r} of {plugin}"
    tables = [Table(t.caption, _plain(what, list(t.columns)), _plain(what, list(t.rows))) for t in section.tables]
    return plugin, replace(section, tables=tables)


def _section(plugin: str, title: str, text: str, tables: list[dict[str, Any]]) -> PluginSection:
    return plugin, Section(title, text, [Table(**table) for table in tables])
