"""``groundwire report DIR``."""

from __future__ import annotations

from pathlib import Path

from groundwire.cli.terminal import CommandError, line, table
from groundwire.display import show
from groundwire.records import Finding


def report(directory: Path) -> int:
    """Print the latest findings of a run and where its page is.

    Args:
        directory: The run's log_dir, or the groundwire folder in it.
    """
    # Only here, so that the other commands work where reports are not installed.
    from groundwire.services.report.page import SEVERITIES, arrange
    from groundwire.services.report.report import Report

    try:
        read = Report.read(directory)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    latest = [entry.latest for block in arrange(read.findings, []) for entry in block.entries]
    if latest:
        table(["", "finding", "when", "value", "message"], map(_row, latest))
    severities = [finding.severity for finding in latest]
    earlier = len(read.findings) - len(latest)
    line(
        ", ".join(f"{severities.count(name)} {name}" for name in SEVERITIES)
        + (f" (and {earlier} earlier)" * bool(earlier))
    )
    line(f"Page: {read.path}")
    return 0


def _row(finding: Finding) -> tuple[str, ...]:
    when = (finding.stage or "") + ("" if finding.epoch is None else f" epoch {finding.epoch}")
    return finding.severity, f"{finding.plugin} {finding.code}", when, show(finding.value), finding.message
