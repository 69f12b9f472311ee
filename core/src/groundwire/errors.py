"""The one error that groundwire raises for what a user can mend, and the problems that it tells together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException


@dataclass(frozen=True)
class Problem:
    """A reason why a run must not start, returned by ``gw_check``.

    Attributes:
        plugin: Name of the plugin that objects.
        message: What is wrong, where, and what was found.
        hint: What to change.

    Example:
        >>> Problem("sam", "rho is -1", "choose rho >= 0").hint
        'choose rho >= 0'
    """

    plugin: str
    message: str
    hint: str = ""


class PluginError(MisconfigurationException):
    """A run, a plugin or a checkpoint cannot be used as it is; the text says what, where, what was found and a way out.

    It is a Lightning ``MisconfigurationException``, so code that already handles Lightning's own keeps working.
    """


def problems_error(problems: Iterable[Problem]) -> PluginError:
    """Return one error for all ``problems``, one line each.

    Example:
        >>> print(problems_error([Problem("sam", "rho is -1", "choose rho >= 0")]))
        groundwire cannot start this run:
          - sam: rho is -1 -> choose rho >= 0
    """
    lines = [f"  - {p.plugin}: {p.message}" + (f" -> {p.hint}" if p.hint else "") for p in problems]
    return PluginError("\n".join(["groundwire cannot start this run:", *lines]))
