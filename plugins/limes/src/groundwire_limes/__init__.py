"""LIMES (Tomaszewska and Lampert, 2022): a classifier that stays right while the class mix moves.

``PriorExtrapolator`` needs NumPy only; torch and Lightning are imported when something else is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundwire_limes.callback import LIMES
    from groundwire_limes.datamodule import StreamDataModule
    from groundwire_limes.extrapolator import Forecast, PriorExtrapolator

_HOME = {
    "LIMES": "callback",
    "Forecast": "extrapolator",
    "PriorExtrapolator": "extrapolator",
    "StreamDataModule": "datamodule",
}

__all__ = ["LIMES", "Forecast", "PriorExtrapolator", "StreamDataModule"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'groundwire_limes' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"groundwire_limes.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
