"""What distances are computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from groundwire_flea.functional import COMPONENTS, Array

Fairness = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]
FAIRNESS = ("demographic_parity", "equal_opportunity", "equalized_odds")
Mode = Literal["filter", "weights", "report"]
MODES = ("filter", "weights", "report")


@dataclass(frozen=True)
class Settings:
    """What distances are computed with; see :func:`groundwire_flea.filter_sources`."""

    fairness: str = "demographic_parity"
    components: tuple[str, ...] = COMPONENTS
    aggregation: str = "sum"
    compat: str | None = None
    device: str = "cpu"
    n_jobs: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class Split:
    """Which rows (R,) classifiers are fitted on, and which they are judged on."""

    fit: Array
    test: Array
