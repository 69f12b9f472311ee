"""Hooks for PyTorch Lightning that Lightning's own callbacks cannot express, and the services behind them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from groundwire.version import __version__

if TYPE_CHECKING:
    from groundwire.checkpoint import export, load
    from groundwire.discovery import load_plugin
    from groundwire.errors import PluginError
    from groundwire.plugin import Plugin, Plugins
    from groundwire.replay import GradientStep
    from groundwire.report import Report
    from groundwire.run import RunContext
    from groundwire.specs import SPEC_VERSION, hookimpl
    from groundwire.train_data import TrainData
    from groundwire.types import Evaluation, Fields, Finding, Head, MicroBatch, Problem, Section, Table, Variant

#: Where each public name lives. Imported when first used, so that the command line and tools stay fast.
_HOME = {
    "Evaluation": "types",
    "Fields": "types",
    "Finding": "types",
    "GradientStep": "replay",
    "Head": "types",
    "MicroBatch": "types",
    "Plugin": "plugin",
    "PluginError": "errors",
    "Plugins": "plugin",
    "Problem": "types",
    "Report": "report",
    "RunContext": "run",
    "SPEC_VERSION": "specs",
    "Section": "types",
    "Table": "types",
    "TrainData": "train_data",
    "Variant": "types",
    "export": "checkpoint",
    "hookimpl": "optimizers",
    "load": "checkpoint",
    "load_plugin": "discovery",
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
    "load_plugin",
    "load",
    "export",
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
