"""Result of the filter: for users, as one table, and in plain types for checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from groundwire_flea.distances.pairwise import COMPONENTS
from groundwire_flea.selection import Mode, Selection, SourceId, source_weights

Plain = None | bool | int | float | str


class FLEAWarning(UserWarning):
    """A guarantee of the filter does not hold, or its decision rests on little."""


@dataclass(frozen=True)
class Caution:
    """One reason not to trust a decision blindly.

    Attributes:
        code: ``"W1"`` ... ``"W8"``, see the documentation.
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
        copies: Sets of sources that are near copies of each other; the first of a set stands for it.
        bound: The share of unfairness that an adversary could force on any learner that does not filter; see
            :func:`groundwire_flea.lower_bound.unavoidable_unfairness`.
    """

    kept: tuple[SourceId, ...]
    suppressed: tuple[SourceId, ...]
    scores: Mapping[SourceId, float]
    distances: pd.DataFrame
    disc: pd.DataFrame
    disp: pd.DataFrame
    disb: pd.DataFrame
    report: pd.DataFrame
    mask: NDArray[Any]
    weights: NDArray[Any] | None
    warnings: tuple[Caution, ...]
    n_clean: int
    mode: str = "filter"
    bound: float = 0.0
    copies: tuple[tuple[SourceId, ...], ...] = ()

    @classmethod
    def of(
        cls, selection: Selection, cautions: Sequence[Caution], *, row_source: NDArray[Any], mode: Mode, alpha: float
    ) -> FLEAResult:
        """The result of a selection.

        Args:
            selection: What was selected.
            cautions: Reasons for caution.
            row_source: (R,) number of the source of each row that the user gave.
            mode: What is done with suppressed sources.
            alpha: Level of the permutation test.
        """
        ids, kept, parts = selection.ids, selection.kept, selection.distances
        index = pd.Index(ids, tupleize_cols=False)  # a source may be a tuple
        total, disc, disp, disb = (
            pd.DataFrame(values, index=index, columns=index)
            for values in (selection.total, parts.disc, parts.disp, parts.disb)
        )
        row_kept, weights = kept[row_source], source_weights(selection.q, kept, selection.counted)
        return cls(
            kept=selection.names(kept),
            suppressed=selection.names(~kept),
            scores={source: float(score) for source, score in zip(ids, selection.q, strict=True)},
            distances=total,
            disc=disc,
            disp=disp,
            disb=disb,
            report=report_table(selection, np.bincount(row_source), alpha),
            mask=row_kept if mode == "filter" else np.ones_like(row_kept),
            weights=weights[row_source] if mode == "weights" else None,
            warnings=tuple(cautions),
            n_clean=selection.k,
            mode=mode,
            bound=selection.bound.value,
            copies=selection.copies,
        )

    def __repr__(self) -> str:
        lines = [f"FLEAResult: {len(self.kept)} of {len(self.scores)} sources kept (mode {self.mode!r})"]
        for source, q in self.scores.items():
            lines.append(f"  {'kept      ' if source in self.kept else 'suppressed'}  q = {q:.3f}  {source!r}")
        return "\n".join([*lines, *(f"  {caution}" for caution in self.warnings)])


def report_table(selection: Selection, rows: NDArray[Any], alpha: float) -> pd.DataFrame:
    """One row for each source.

    Args:
        selection: What was selected.
        rows: (n,) rows that the user gave of each source.
        alpha: Level of the permutation test.
    """
    data, tested = selection.data, selection.significance
    columns: dict[str, object] = {"rows": rows}
    for code, label in enumerate(selection.labels):
        columns[f"P(y={label})"] = data.frequency(data.y == code)
    for code, group in enumerate(selection.groups):
        columns[f"P(a={group})"] = data.frequency(data.a == code)
    columns["label gap"] = data.label_gap()
    columns["q"] = selection.q
    for name, value in zip(COMPONENTS, component_shares(selection), strict=True):
        columns[f"{name} share"] = value
    columns["cross-fitted q"] = np.full(data.n, np.nan) if tested is None else tested.q
    columns["p-value"] = np.full(data.n, np.nan) if tested is None else tested.p
    columns["kept"] = selection.kept
    columns["why"] = reasons(selection, alpha)
    return pd.DataFrame(columns, index=pd.Index(selection.ids, name="source", tupleize_cols=False))


def component_shares(selection: Selection) -> NDArray[Any]:
    """(3, n): which part of a source's mean distance to its K nearest each component makes up.

    With the aggregation "max" they are shares of the sum of the components all the same.
    """
    nearest = np.argsort(selection.total, axis=1, kind="stable")[:, : selection.k]
    found = selection.distances
    parts = np.stack([np.take_along_axis(part, nearest, 1).sum(1) for part in (found.disc, found.disp, found.disb)])
    whole = parts.sum(0)
    result: NDArray[Any] = np.divide(parts, whole, out=np.zeros_like(parts), where=whole > 0)
    return result


def reasons(selection: Selection, alpha: float) -> list[str]:
    """Reasons, in words, why each source is kept or suppressed."""
    q, k, tested = selection.q, selection.k, selection.significance
    eligible = np.where(selection.counted, q, np.inf)
    places = np.argsort(np.argsort(eligible, kind="stable"), kind="stable") + 1
    texts = []
    for i, (place, is_kept) in enumerate(zip(places, selection.kept, strict=True)):
        rank = f"score {q[i]:.3f} is number {place} of {int(selection.counted.sum())} from below"
        if selection.vouched[i]:
            texts.append(f"always kept; {rank}" if selection.counted[i] else "always kept")
        elif not selection.counted[i]:
            texts.append(f"a copy of {selection.ids[selection.stands_for[i]]!r}, which counts for it")
        elif is_kept and place <= k:
            texts.append(f"{rank}, and {k} are kept")
        elif is_kept and tested is not None:
            texts.append(f"not suspicious (p = {tested.p[i]:.3f} > {alpha:g}); {rank}")
        else:
            texts.append(f"{rank}, and only {k} are kept")
    return texts


@dataclass(frozen=True)
class SavedResult:
    """A result in plain types, as it travels between ranks and lies in checkpoints.

    Attributes:
        sources: All sources, in order of first appearance.
        kept: bool of each.
        q: Score of each.
        hash: Of the source of every row; tells whether data are the same at a resume.
        n_clean: K.
        distances: D as rows of numbers.
        columns: The report table by column.
        cautions: ``(code, message, value)`` of each.
        bound: See :class:`groundwire_flea.FLEAResult`.
        copies: See there.
        options: Arguments on which the decision depends, by name.
    """

    sources: Sequence[Plain]
    kept: Sequence[bool]
    q: Sequence[float]
    hash: str
    n_clean: int
    distances: Sequence[Sequence[float]]
    columns: Mapping[str, Sequence[Plain]]
    cautions: Sequence[tuple[str, str, float | None]] = ()
    bound: float = 0.0
    copies: Sequence[Sequence[Plain]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    version: int = field(default=1)

    @classmethod
    def of(
        cls, result: FLEAResult, row_sources: Sequence[Plain], options: Mapping[str, Any] | None = None
    ) -> SavedResult:
        """From ``result``, about rows of these sources, with these options."""
        report = result.report
        return cls(
            sources=list(result.scores),  # type: ignore[arg-type]  # the data set's reader makes ids plain
            kept=report["kept"].tolist(),
            q=list(result.scores.values()),
            hash=source_hash(row_sources),
            n_clean=result.n_clean,
            distances=result.distances.to_numpy().tolist(),
            columns={str(name): [_number(v) for v in report[name].tolist()] for name in report},
            cautions=[(c.code, c.message, c.value) for c in result.warnings],
            bound=result.bound,
            copies=[list(copies) for copies in result.copies],  # type: ignore[arg-type]
            options=dict(options or {}),
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SavedResult:
        """From :meth:`state`."""
        cautions = [tuple(caution) for caution in state["cautions"]]
        return cls(**{**state, "cautions": cautions})

    def state(self) -> dict[str, Any]:
        """As a dict of plain types."""
        return {**asdict(self), "cautions": [list(caution) for caution in self.cautions]}

    def named(self, kept: bool) -> list[Plain]:
        """The sources that are kept, or those that are not."""
        return [source for source, here in zip(self.sources, self.kept, strict=True) if here == kept]

    def unseen(self, row_sources: Sequence[Plain]) -> list[Plain]:
        """Sources of rows about which nothing was decided."""
        return [source for source in dict.fromkeys(row_sources) if source not in self.sources]

    def keeps(self, row_sources: Sequence[Plain]) -> NDArray[Any]:
        """Bool (R,): whether each row is of a kept source."""
        kept = dict(zip(self.sources, self.kept, strict=True))
        return np.array([kept[source] for source in row_sources], dtype=bool)

    def weights(self, row_sources: Sequence[Plain]) -> NDArray[Any]:
        """(R,) sampling weights of the mode "weights"."""
        others = {source for copies in self.copies for source in copies[1:]}
        once = bool(self.options.get("count_copies_once", False))
        counted = np.array([not (once and source in others) for source in self.sources])
        values = source_weights(np.array(self.q), np.array(self.kept), counted)
        weight = dict(zip(self.sources, values, strict=True))
        return np.array([weight[source] for source in row_sources])


def _number(value: Plain) -> Plain:
    """NaN, which is not even equal to itself, as None."""
    return None if isinstance(value, float) and value != value else value


def source_hash(row_sources: Sequence[Plain]) -> str:
    """A hash of the source of every row, in order.

    Example:
        >>> source_hash(["a", "b"]) == source_hash(["a", "b"]) != source_hash(["b", "a"])
        True
    """
    known: dict[Plain, int] = {}
    codes = [known.setdefault(source, len(known)) for source in row_sources]
    digest = hashlib.sha256(repr(list(known)).encode())
    digest.update(np.array(codes, dtype=np.int64).tobytes())
    return digest.hexdigest()
