"""Single samples: fetched again by id, drawn where they are images, and examples of each cell of the confusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import default_collate

from groundwire import PluginError, RunContext
from groundwire.undo.random_states import preserve_rng
from groundwire_bias_audit.audit.groups import joined
from groundwire_bias_audit.audit.predictions import Outputs
from groundwire_bias_audit.audit.score_metrics import BAND
from groundwire_bias_audit.stream.scored_rows import LOADER_STEP

#: Longest side of an image on the page, in pixels; larger ones are thinned out.
LONGEST = 96


class Samples:
    """The inputs of single rows of the running stage.

    Args:
        run: The run, which reads batches.
        loader_of: Gives the data loader of a number.
    """

    def __init__(self, run: RunContext, loader_of: Callable[[int], Any]) -> None:
        self._run, self._loader_of = run, loader_of

    def inputs(self, row: int) -> Tensor | None:
        """A batch of the one row with this id, or None where its data set has no index or its input is no tensor."""
        loader = self._loader_of(int(row) // LOADER_STEP)
        dataset: Any = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__getitem__"):
            return None
        collate = getattr(loader, "collate_fn", None) or default_collate
        # A data set may draw random numbers; and gradients need tensors that inference mode did not make.
        with preserve_rng(), torch.inference_mode(False):
            try:
                found = self._run.fields(collate([dataset[int(row) % LOADER_STEP]])).inputs
            except (PluginError, TypeError, ValueError, IndexError, KeyError):
                return None
        return found if isinstance(found, Tensor) and found.ndim and len(found) == 1 else None

    def images(self, rows: Iterable[int]) -> list[NDArray[Any]]:
        """Pictures of the rows with these ids, or none at all where one is no image."""
        found = []
        for row in rows:
            picture = image(self.inputs(row))
            if picture is None:
                return []
            found.append(picture)
        return found


def image(inputs: Tensor | None) -> NDArray[Any] | None:
    """The only row of a batch as ``(H, W)`` or ``(H, W, 3)`` in [0, 1], or None if it is no image.

    Example:
        >>> image(torch.rand(1, 3, 8, 6)).shape
        (8, 6, 3)
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    whole = inputs[0].detach().float().cpu()
    low, high = float(whole.min()), float(whole.max())
    whole = (whole - low) / (high - low) if high > low else whole * 0
    return thinned(whole[0].numpy() if len(whole) == 1 else whole.permute(1, 2, 0).numpy())


def thinned(picture: NDArray[Any]) -> NDArray[Any]:
    """Every n-th row and column, so that no side is longer than ``LONGEST``; a copy that keeps no larger one alive.

    Example:
        >>> thinned(np.zeros((400, 200, 3))).shape
        (80, 40, 3)
    """
    step = -(-max(picture.shape[:2]) // LONGEST)
    return np.array(picture[::step, ::step])


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
