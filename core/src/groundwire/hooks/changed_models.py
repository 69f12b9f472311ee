"""The plugins that left something in a model, for ``groundwire.export``. The model itself carries no trace of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from groundwire.hooks.ordering import name_of
from groundwire.hooks.registry import implementations

_plugins_of: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def remember(module: nn.Module, plugins: Sequence[Any]) -> None:
    """Note which of ``plugins`` leave something in ``module``; of two with one name the latest counts."""
    left = [p for p in plugins if {"gw_transform_model", "gw_export"} & implementations(p).keys()]
    _plugins_of[module] = _plugins_of.get(module, {}) | {name_of(p): p for p in left}


def plugins_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the plugins that left something in ``module`` in this process."""
    return tuple(_plugins_of.get(module, {}).values())
