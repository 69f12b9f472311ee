"""The one error that groundwire raises for what a user can mend."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.fabric.utilities.exceptions import MisconfigurationException

from groundwire.types import Problem


class PluginError(MisconfigurationException):
    """A run, a plugin or a checkpoint cannot be used as it is; the text says what, where, what was found and a way out.

    It is a Lightning ``MisconfigurationException``, so code that already handles Lightning's own keeps working.
    """


def problems_error(problems: Iterable[Problem]) -> PluginError:
    """One error for all ``problems``, one line each.

    Example:
        >>> print(problems_error([Problem("sam", "rho is -1", "choose rho >= 0")]))
        groundwire cannot start this run:
          - sam: rho is -1 -> choose rho >= 0
    """
    lines = [f"  - {p.plugin}: {p.message}" + (f" -> {p.hint}" if p.hint else "") for p in problems]
    return PluginError("\n".join(["groundwire cannot start this run:", *lines]))
