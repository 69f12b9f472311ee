"""Plain modules: everything that plugins added is baked in, and nothing of groundwire is left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from groundwire.errors import PluginError
from groundwire.hooks.changed_models import plugins_of
from groundwire.hooks.ordering import name_of
from groundwire.hooks.registry import call_outside_run, implementations
from groundwire.modules import without_shifts

#: A persistent empty buffer with this prefix in a parametrization names the plugin that the weights need.
BUFFER_PREFIX = "groundwire_"
_Module = TypeVar("_Module", bound=nn.Module)


def export(module: _Module, plugins: Sequence[Any] | None = None) -> _Module:
    """Return a plain copy of ``module``: everything that plugins added is baked into ordinary weights.

    Args:
        module: A model that was trained in a run or came from :func:`load`. It stays as it is.
        plugins: The plugins to bake; by default those that were at work on ``module`` in this process.

    Raises:
        PluginError: A part of ``module`` belongs to a plugin that is not among them.

    Example:
        >>> export(nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    plugins = list(plugins_of(module) if plugins is None else plugins)
    for plugin in plugins:
        if {"gw_transform_model", "gw_export"} & implementations(plugin).keys() == {"gw_transform_model"}:
            raise PluginError(
                f"{name_of(plugin)} changed the model and has no gw_export, so it cannot be taken out again"
            )
    plain = copy.deepcopy(module)
    without_shifts(plain)
    _separate_classes(plain)
    call_outside_run(reversed(plugins), "gw_export", module=plain, run=None)
    left = {part for key in plain.state_dict() for part in key.split(".") if part.startswith(BUFFER_PREFIX)}
    if left:
        names = ", ".join(sorted(part.removeprefix(BUFFER_PREFIX) for part in left))
        raise PluginError(f"the model still carries parts of the plugin {names} -> export(module, plugins=[...])")
    return plain


def _separate_classes(module: nn.Module) -> None:
    """Give each parametrized layer of a copy a class of its own.

    torch copies such a layer with its generated class, and ``remove_parametrizations`` deletes the weight's property
    from that class: without this, baking the copy would break the original.
    """
    for child in module.modules():
        if parametrize.is_parametrized(child):
            cls = type(child)
            names = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
            child.__class__ = type(cls.__name__, cls.__bases__, names)
