"""The base of the services of core: each is one job, readable and removable alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from groundwire.run import Run


class Service:
    """A job of core in one run.

    It holds the :class:`Run`, never the host and never another service. What it needs of another goes through a hook,
    which a service may implement as a plugin does, or through a field of the run: members that plugins see, actions
    before and after batches, marks of extra passes. The host makes all services when the run opens.

    Attributes:
        name: How it is called among the implementers of hooks.
        run: The run.
    """

    name: ClassVar[str]

    def __init__(self, run: Run) -> None:
        self.run = run

    def open(self) -> None:
        """Begin, once the first check passed; model and optimizers may not exist yet."""

    def model_is_built(self) -> None:
        """Take note that model and optimizers exist; the second check follows."""

    def start(self) -> None:
        """Begin what needs model and optimizers, once the second check passed."""

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        """Return what is to be called at which of Lightning's callback hooks in this run; asked after :meth:`start`."""
        return {}
