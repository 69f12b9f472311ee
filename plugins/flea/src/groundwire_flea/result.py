"""What the filter found out and decided."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import pandas as pd

from groundwire_flea.functional import Array

SourceId: TypeAlias = Hashable


class FLEAWarning(UserWarning):
    """A guarantee of the filter does not hold, or its decision rests on little."""


@dataclass(frozen=True)
class Caution:
    """One reason not to trust a decision blindly.

    Attributes:
        code: ``"W1"`` ... ``"W7"``, see the documentation.
        message: What, with sources and numbers, and what to do.
        sources: The sources it is about.
        value: The number behind it.
    """

    code: str
    message: str
    sources: tuple[SourceId, ...] = ()
    value: float | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True)
class FLEAResult:
    """The filter's decision and everything behind it. Sources are in order of first appearance.

    Attributes:
        kept: Sources to train on.
        suppressed: The others.
        scores: q by source: the K-th smallest distance to a source, its own 0 included.
        distances: D between all sources.
        disc: The part of D that is discrepancy.
        disp: The part of D that is disparity.
        disb: The part of D that is disbalance.
        report: One row for each source: rows, base and group rates, gap of the labels, q, shares of the components,
            cross-fitted q, permutation p-value, whether it is kept, and why.
        mask: (rows of X,) bool: the rows to train on. All True in the modes "weights" and "report".
        weights: (rows of X,) sampling weights in the mode "weights" (no guarantee), else None.
        warnings: Reasons for caution.
        n_clean: K.
        mode: "filter", "weights" or "report".
        bound: The share of unfairness that an adversary could force on any learner that does not filter; see
            :func:`groundwire_flea.functional.unavoidable_unfairness`.
    """

    kept: tuple[SourceId, ...]
    suppressed: tuple[SourceId, ...]
    scores: Mapping[SourceId, float]
    distances: pd.DataFrame
    disc: pd.DataFrame
    disp: pd.DataFrame
    disb: pd.DataFrame
    report: pd.DataFrame
    mask: Array
    weights: Array | None
    warnings: tuple[Caution, ...]
    n_clean: int
    mode: str = "filter"
    bound: float = 0.0

    def __repr__(self) -> str:
        lines = [f"FLEAResult: {len(self.kept)} of {len(self.scores)} sources kept (mode {self.mode!r})"]
        for source, q in self.scores.items():
            lines.append(f"  {'kept      ' if source in self.kept else 'suppressed'}  q = {q:.3f}  {source!r}")
        return "\n".join([*lines, *(f"  {caution}" for caution in self.warnings)])
