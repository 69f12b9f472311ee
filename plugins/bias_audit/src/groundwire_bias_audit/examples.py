"""A few samples of each cell of the confusion matrix, remembered while rows stream by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from groundwire_bias_audit.encoding import joined
from groundwire_bias_audit.histogram import BAND
from groundwire_bias_audit.inputs import Outputs

CELLS = {"TP": (1, 1), "FN": (1, 0), "FP": (0, 1), "TN": (0, 0)}
#: Samples of each cell.
MOST = 3


class Example(NamedTuple):
    """One sample: its id, P(y=1), and its groups."""

    id: int
    score: float
    groups: tuple[Any, ...]


class Examples:
    """The first samples of TP, FN, FP and TN of a binary task, certain and uncertain.

    Attributes:
        cells: At most three samples by (kind, "certain" or "uncertain").

    Example:
        >>> outputs = Outputs("binary", ("",), np.array([[1], [0]]), np.array([[1], [1]]), np.array([[0.95], [0.6]]))
        >>> seen = Examples()
        >>> seen.update(outputs, {"sex": ["f", "m"]}, [7, 8])
        >>> seen.cells["TP", "certain"], seen.cells["FP", "uncertain"]
        ([Example(id=7, score=0.95, groups=('f',))], [Example(id=8, score=0.6, groups=('m',))])
    """

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], list[Example]] = {
            cell: [] for cell in product(CELLS, ("certain", "uncertain"))
        }

    def update(self, outputs: Outputs, features: Mapping[str, Any], ids: ArrayLike) -> None:
        """Take what is still missing from a batch."""
        if outputs.task != "binary" or outputs.scores is None:
            return
        rows, p = np.asarray(ids), outputs.scores[:, 0]
        label, prediction = outputs.labels[:, 0], outputs.predictions[:, 0]
        sure = {"certain": (p <= BAND[0]) | (p >= BAND[1]), "uncertain": (p > BAND[0]) & (p < BAND[1])}
        for (kind, certainty), held in self.cells.items():
            if len(held) < MOST:
                y, predicted = CELLS[kind]
                inside = (label == y) & (prediction == predicted) & sure[certainty]
                for i in np.flatnonzero(inside)[: MOST - len(held)]:
                    groups = tuple(joined([values])[i : i + 1].tolist()[0] for values in features.values())
                    held.append(Example(int(rows[i]), float(p[i]), groups))

    @classmethod
    def merged(cls, parts: Iterable[Examples]) -> Examples:
        """Of several processes together, those with the smallest ids."""
        found = cls()
        for part in parts:
            for cell, examples in part.cells.items():
                found.cells[cell] = sorted([*found.cells[cell], *examples], key=lambda example: example.id)[:MOST]
        return found
