"""``groundwire plugins``."""

from __future__ import annotations

from groundwire.cli.terminal import line, table
from groundwire.discovery import installed


def plugins(check: bool = False) -> int:
    """List the installed plugins.

    Args:
        check: Import each one too, and end with 1 if one fails.
    """
    rows = installed(check)
    if not rows:
        line('No plugin is installed. Try: pip install "groundwire[all]", or pip install groundwire-<name>')
        return 0
    shown = [(row.name, row.status, f"{row.dist} {row.version}", row.value) for row in rows]
    table(["plugin", "status", "from", "class"], shown)
    for row in rows:
        if row.reason:
            line(f"{row.name}: {row.status}: {row.reason}")
    return int(check and any(row.status == "failed" for row in rows))
