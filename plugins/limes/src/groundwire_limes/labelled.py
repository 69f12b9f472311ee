"""A training batch with its labels, after it was learned from: what is counted of it, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire import Fields, PluginError
from groundwire_limes.clock import Steps
from groundwire_limes.labels import Labels, class_scores, labels_of, two_columns
from groundwire_limes.tally import Scored, exact
from groundwire_limes.timeline import Timeline
from groundwire_limes.times import times_of
from groundwire_limes.unlabelled import Memory


@dataclass(frozen=True)
class Labelled:
    """Predictions of a batch and their labels.

    Attributes:
        steps: Of the batch's rows.
        raw: Scores without offset, (N, K), float32; N is B, or B times the places of a row.
        labels: Of the N predictions.
    """

    steps: Steps
    raw: Tensor
    labels: Labels

    @classmethod
    def of(cls, steps: Steps, scores: Tensor, targets: Any, classes: int, conv: bool, indices: bool) -> Labelled:
        """From the head's ``scores`` and the batch's ``targets``; the rest is as for :func:`labels_of`."""
        raw = two_columns(class_scores(scores, conv))
        return cls(steps, raw, labels_of(targets, classes, len(raw), conv, indices))

    @property
    def places(self) -> int:
        """Predictions of each row."""
        return len(self.raw) // self.steps.rows

    def count(self, line: Timeline, row_weights: Tensor | None) -> None:
        """Add labels and the quality of the predictions to the steps that they belong to.

        Args:
            line: The stream.
            row_weights: Shape (B,); 1 if None.
        """
        weights = self.labels.weights(exact(self.raw.device))
        if row_weights is not None:
            weights = weights * row_weights.to(weights).repeat_interleave(self.places)
        for step in self.steps.distinct:
            line.expect(step)
            offset = line.log_prior(step, self.raw.device)
            if isinstance(self.steps.keys, int):
                line.tally.add(step, Scored(self.raw, offset, self.labels, weights))
            else:
                rows = torch.tensor(self._belonging_to(step), device=self.raw.device)
                line.tally.add(step, Scored(self.raw[rows], offset, self.labels.rows(rows), weights[rows]))

    def _belonging_to(self, step: int) -> np.ndarray[Any, Any]:
        return np.repeat(self.steps.belonging_to(step), self.places)

    def remember(self, memory: Memory) -> None:
        """Scores and labels for the gate of :mod:`groundwire_limes.unlabelled`."""
        known, hard = self.labels.weights().cpu().numpy() > 0, self.labels.hard.cpu().numpy()
        for step in self.steps.distinct:
            if memory.wants(step):
                rows = known & self._belonging_to(step)
                raw = self.raw[torch.as_tensor(rows, device=self.raw.device)]
                memory.learn(step, raw.cpu().numpy(), hard[rows])


def weights_of(where: str | Callable[[Any], Any] | None, batch: Any, rows: int) -> Tensor | None:
    """Weight of each row of a batch in the counts, shape (B,); None if all are 1.

    Args:
        where: A key of the batch, or ``where(batch)``; None for no weights.
        batch: As the loader gave it.
        rows: B.

    Raises:
        PluginError: They are not there or not as many as rows, or one is negative or not finite.
    """
    if where is None:
        return None
    found = where(batch) if callable(where) else times_of(where, batch, Fields(None))
    if found is None:
        raise PluginError(f"limes: no weights {where!r} in a training batch -> LIMES(weights='their key')")
    weights = torch.as_tensor(found).reshape(-1)
    if len(weights) != rows:
        raise PluginError(f"limes: {len(weights)} weights for a batch of {rows} rows -> one for each")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise PluginError("limes: a row's weight is negative or not finite -> weights are at least 0")
    return weights
