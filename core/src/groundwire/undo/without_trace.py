"""Running a module's code once more, as if it had not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from groundwire._lightning import Trainer, loggers_replaced, logging_to
from groundwire.undo.loggers import MutedLogger
from groundwire.undo.random_states import preserve_rng
from groundwire.undo.snapshot import Snapshot


@contextmanager
def without_trace(
    module: nn.Module,
    trainer: Trainer | None = None,
    log: Callable[..., None] | None = None,
    also: Iterable[Any] = (),
) -> Iterator[None]:
    """Context manager that runs a module's code once more without leaving a trace.

    Meanwhile the module works on copies of its buffers and tensor attributes. Put back on exit, whatever happens:
    these, the module's own attributes, registries and metrics, the global random states, and the Trainer's loggers.
    Not undone: parameters, gradients, files, prints, objects outside the module.

    Args:
        module: The module whose code runs.
        trainer: Its Trainer, if it has one; its loggers are muted meanwhile.
        log: Receives the ``self.log(name, value, ...)`` calls; they are dropped when it is left out.
        also: Objects whose code runs too: their attributes are put back.
    """
    with ExitStack() as stack:
        stack.callback(Snapshot(module, also).restore)
        stack.enter_context(preserve_rng())
        if trainer is not None:
            stack.enter_context(loggers_replaced(trainer, MutedLogger))
        stack.enter_context(logging_to(module, log or _drop))
        yield


def _drop(*args: Any, **kwargs: Any) -> None:
    """Take a ``self.log`` call and do nothing."""
