"""Optimizers that implement hooks take part in a run, or say that they cannot.

Nothing opens a run for an optimizer alone, and then its hooks would never be called: it would silently be the plain
optimizer that it is built on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from groundwire._lightning import is_lightnings_step
from groundwire.errors import PluginError

#: The optimizers whose hooks are registered in an open run.
in_a_run: WeakSet[Optimizer] = WeakSet()


def require_run(optimizer: Optimizer) -> None:
    """Have ``optimizer`` refuse to be stepped by a Trainer without a run. Call it at the end of its ``__init__``.

    Without a Trainer it steps as always. With a gradient scaler Lightning hides its step, and this cannot be seen.

    Example:
        >>> import torch
        >>> from groundwire import hookimpl
        >>> class Mine(torch.optim.SGD):
        ...     def __init__(self, params, lr):
        ...         super().__init__(params, lr)
        ...         require_run(self)
        ...     @hookimpl
        ...     def gw_gradient(self, step): ...
        >>> Mine([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()
    """
    optimizer.register_step_pre_hook(_refuse_without_run)


def _refuse_without_run(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise if a Trainer steps ``optimizer`` and no run is open."""
    if optimizer not in in_a_run and is_lightnings_step(kwargs):
        name = type(optimizer).__name__
        raise PluginError(
            f"{name} implements groundwire hooks, and no run is open to call them -> add groundwire.Plugins() to the "
            "Trainer's callbacks"
        )
