"""Optimizers that implement hooks take part in a run, or say that they cannot.

Nothing opens a run for an optimizer alone, and then its hooks would never be called: it would silently be the plain
optimizer that it is built on. So importing ``hookimpl`` makes torch ask here before each step of any optimizer, which
costs a dictionary look-up for all that implement no hook.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from groundwire._lightning import is_lightnings_step
from groundwire.errors import PluginError
from groundwire.specs import PROJECT, hookimpl

__all__ = ["hookimpl", "in_a_run"]

#: The optimizers whose hooks are registered in an open run.
in_a_run: WeakSet[Optimizer] = WeakSet()


@functools.cache
def _implements_hooks(cls: Hashable) -> bool:
    return any(hasattr(getattr(cls, name, None), f"{PROJECT}_impl") for name in dir(cls) if name.startswith("gw_"))


def _refuse_outside_a_run(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
    """Raise for an optimizer with hooks that Lightning steps without a run."""
    cls: Any = type(optimizer)
    if _implements_hooks(cls) and optimizer not in in_a_run and is_lightnings_step(kwargs):
        name = cls.__name__
        raise PluginError(
            f"{name} implements groundwire hooks, and no run is open to call them -> add groundwire.Plugins() to the "
            "Trainer's callbacks"
        )


register_optimizer_step_pre_hook(_refuse_outside_a_run)
