"""For authors of plugins: the contract that every plugin must pass, in one call, and what it is made of.

The pytest fixtures ``gw_fit`` and ``gw_resume`` are there wherever groundwire is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundwire.testing.contract import check_plugin
    from groundwire.testing.fitting import Fit, differences
    from groundwire.testing.loaders import Rows, StatefulLoader
    from groundwire.testing.modules import Classifier
    from groundwire.testing.report import CheckReport, Outcome
    from groundwire.testing.resuming import Resumed

# Imported when first used: pytest imports this package at every start, where nobody may ask for torch.
_HOME = {
    "CheckReport": "report",
    "Classifier": "modules",
    "Fit": "fitting",
    "Outcome": "report",
    "Resumed": "resuming",
    "Rows": "loaders",
    "StatefulLoader": "loaders",
    "check_plugin": "contract",
    "differences": "fitting",
}

__all__ = [
    "CheckReport",
    "Classifier",
    "Fit",
    "Outcome",
    "Resumed",
    "Rows",
    "StatefulLoader",
    "check_plugin",
    "differences",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'groundwire.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"groundwire.testing.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
