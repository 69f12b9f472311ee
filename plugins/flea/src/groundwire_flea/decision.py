"""A decision in plain types, as it travels between ranks and lies in checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from groundwire_flea.functional import Array
from groundwire_flea.result import FLEAResult
from groundwire_flea.summary import source_weights

Plain = None | bool | int | float | str


@dataclass(frozen=True)
class Decision:
    """What was decided for each source, and why.

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
    version: int = field(default=1)

    @classmethod
    def of(cls, result: FLEAResult, row_sources: Sequence[Plain]) -> Decision:
        """The decision in ``result`` about rows of these sources."""
        report = result.report
        return cls(
            sources=list(result.scores),  # type: ignore[arg-type]  # the reader makes ids plain
            kept=report["kept"].tolist(),
            q=list(result.scores.values()),
            hash=source_hash(row_sources),
            n_clean=result.n_clean,
            distances=result.distances.to_numpy().tolist(),
            columns={str(name): [_number(v) for v in report[name].tolist()] for name in report},
            cautions=[(c.code, c.message, c.value) for c in result.warnings],
            bound=result.bound,
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Decision:
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

    def keeps(self, row_sources: Sequence[Plain]) -> Array:
        """Bool (R,): whether each row is of a kept source."""
        kept = dict(zip(self.sources, self.kept, strict=True))
        return np.array([kept[source] for source in row_sources], dtype=bool)

    def weights(self, row_sources: Sequence[Plain]) -> Array:
        """(R,) sampling weights of the mode "weights"."""
        values = source_weights(np.array(self.q), np.array(self.kept))
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
