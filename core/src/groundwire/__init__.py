"""Hooks for PyTorch Lightning that Lightning's own callbacks cannot express, and the services behind them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from groundwire.version import __version__

if TYPE_CHECKING:
    from groundwire.batch import default_fields
    from groundwire.context import RunContext
    from groundwire.discovery import load_plugin
    from groundwire.errors import PluginError, Problem
    from groundwire.hooks.markers import SPEC_VERSION, hookimpl
    from groundwire.optimizers import require_run
    from groundwire.plugin import Plugin, Plugins
    from groundwire.records import (
        Evaluation,
        Fields,
        Finding,
        GradientStep,
        Head,
        MicroBatch,
        Section,
        Table,
        Variant,
    )
    from groundwire.services.checkpoint.export import export
    from groundwire.services.checkpoint.load import load
    from groundwire.services.report.report import Report
    from groundwire.train_data import TrainData

#: Where each public name lives. Imported when first used, so that the command line and tools stay fast.
_HOME = {
    "Evaluation": "records",
    "Fields": "records",
    "Finding": "records",
    "GradientStep": "records",
    "Head": "records",
    "MicroBatch": "records",
    "Plugin": "plugin",
    "PluginError": "errors",
    "Plugins": "plugin",
    "Problem": "errors",
    "Report": "services.report.report",
    "RunContext": "context",
    "SPEC_VERSION": "hooks.markers",
    "Section": "records",
    "Table": "records",
    "TrainData": "train_data",
    "Variant": "records",
    "default_fields": "batch",
    "export": "services.checkpoint.export",
    "hookimpl": "hooks.markers",
    "load": "services.checkpoint.load",
    "load_plugin": "discovery",
    "require_run": "optimizers",
}

__all__ = [  # noqa: RUF022 - grouped as people meet them
    "Plugin",
    "Plugins",
    "hookimpl",
    "RunContext",
    "GradientStep",
    "MicroBatch",
    "TrainData",
    "Fields",
    "Head",
    "Evaluation",
    "Finding",
    "Problem",
    "PluginError",
    "Variant",
    "Section",
    "Table",
    "Report",
    "default_fields",
    "load_plugin",
    "load",
    "export",
    "require_run",
    "SPEC_VERSION",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'groundwire' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"groundwire.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
