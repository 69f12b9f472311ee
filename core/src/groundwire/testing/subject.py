"""The plugin under test, and the words in which a check says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from groundwire.hooks.registry import call_outside_run
from groundwire.testing.fitting import Fit, fit
from groundwire.testing.isolation import seeded
from groundwire.testing.modules import Classifier


class NotApplicableError(Exception):
    """This check says nothing about this plugin; the text says why."""


class ViolationError(AssertionError):
    """The plugin broke the contract; the text says how."""


def refuse(problems: Iterable[str], where: str = "") -> None:
    """Raise if there is a problem.

    Raises:
        ViolationError: With up to five of the problems.
    """
    lines = list(problems)
    if lines:
        more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise ViolationError(f"{where}{': ' if where else ''}{'; '.join(lines[:5] + more)}")


@dataclass(frozen=True)
class Subject:
    """A plugin under test.

    Attributes:
        factory: Makes the plugin.
        directory: A folder of this check's own.
        neutral: Makes the plugin so that it changes nothing, or None.
        own_module: Makes the module to train, or None for the kit's.
    """

    factory: Callable[[], Any]
    directory: Path
    neutral: Callable[[], Any] | None = None
    own_module: Callable[[], Any] | None = None

    def module(self) -> Any:
        """A new module, always with the same initial weights."""
        with seeded():
            return (self.own_module or Classifier)()

    def fit(self, callbacks: Any, module: Any = None, **options: Any) -> Fit:
        """One fit of ``module`` (a new one when left out) with ``callbacks``."""
        return fit(callbacks, self.module() if module is None else module, self.directory, **options)

    def kit_only(self, why: str) -> None:
        """Raise unless the kit's own module is trained.

        Raises:
            NotApplicableError: A module was given.
        """
        if self.own_module is not None:
            raise NotApplicableError(f"the module is the caller's, and {why}")


def transformed(module: nn.Module, plugin: Any) -> Any:
    """``module`` with the structure that ``plugin`` gives it, as ``groundwire.load`` does it outside a run."""
    call_outside_run([plugin], "gw_transform_model", module=module, run=None)
    return module
