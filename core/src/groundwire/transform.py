"""Letting plugins change the model's structure at the only right moment.

The model may exist before the run, be built in ``LightningModule.setup``, or in ``configure_model``; weights are
restored and optimizers made right after. So the hook runs once at opening and once more behind each of them. A
wrapper does not survive pickle, so it is gone before training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from groundwire._lightning import instance_attribute, overrides, spawns_processes
from groundwire.errors import problems_error
from groundwire.hooks import implementations
from groundwire.order import name_of
from groundwire.types import Problem

if TYPE_CHECKING:
    from groundwire.host import Host

#: Which plugins changed a model, for ``export``. The model itself carries no trace of it.
_plugins_of: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def apply(host: Host, stack: ExitStack) -> None:
    """Transform now, and again after the user's own ``setup`` and ``configure_model`` while ``stack`` is open."""
    remember(host.module, host.plugins)
    if not host.hooks.owners("gw_transform_model"):
        return
    _transform(host)
    for name in ("setup", "configure_model"):
        # A wrapper around Lightning's own empty method would look like an override and cause warnings.
        if overrides(host.module, name):
            stack.enter_context(instance_attribute(host.module, name, _then_transform(host, name)))


def _then_transform(host: Host, name: str) -> Callable[..., None]:
    original = getattr(host.module, name)

    def build(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        _transform(host)

    return build


def _transform(host: Host) -> None:
    before = set(host.module.state_dict()) if spawns_processes(host.trainer) else None
    host.hooks.call("gw_transform_model", module=host.module)
    if before is not None and set(host.module.state_dict()) != before:
        raise problems_error([_only_in_children(host)])


def _only_in_children(host: Host) -> Problem:
    owners = ", ".join(host.hooks.owners("gw_transform_model"))
    strategy = type(host.trainer.strategy).__name__
    return Problem(
        owners,
        f"the model would change in the child processes of {strategy} only, and this process would silently keep "
        "initial weights",
        "transform the model before fit, or use strategy='ddp'",
    )


def remember(module: nn.Module, plugins: Sequence[Any]) -> None:
    """Note which of ``plugins`` leave something in ``module``; of two with one name the latest counts."""
    left = [p for p in plugins if {"gw_transform_model", "gw_export"} & implementations(p).keys()]
    _plugins_of[module] = _plugins_of.get(module, {}) | {name_of(p): p for p in left}


def plugins_of(module: nn.Module) -> tuple[Any, ...]:
    """The plugins that left something in ``module`` in this process."""
    return tuple(_plugins_of.get(module, {}).values())
