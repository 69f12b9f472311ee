"""A training batch with its labels, after it was learned from: what is counted of it, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire import Fields, PluginError
from groundwire_limes.labels import class_scores, soft_labels, two_columns
from groundwire_limes.tally import Scored
from groundwire_limes.timeline import Timeline
from groundwire_limes.times import times_of
from groundwire_limes.unlabelled import Memory


@dataclass(frozen=True)
class Labelled:
    """Predictions of a batch and their labels.

    Attributes:
        steps: Of the batch's rows, shape (B,).
        raw: Scores without offset, (N, K); N is B, or B times the places of a row.
        shares: Labels as class shares, (N, K).
        mask: Which predictions have a label, (N,).
    """

    steps: np.ndarray[Any, Any]
    raw: Tensor
    shares: Tensor
    mask: Tensor

    @classmethod
    def of(cls, steps: np.ndarray[Any, Any], scores: Tensor, targets: Any, classes: int, conv: bool) -> Labelled:
        """From the head's ``scores`` and the batch's ``targets``; ``conv`` if the classes are in dimension 1."""
        raw = two_columns(class_scores(scores, conv))
        return cls(steps, raw, *soft_labels(targets, classes, len(raw), conv))

    @property
    def places(self) -> int:
        """Predictions of each row."""
        return len(self.raw) // len(self.steps)

    def count(self, line: Timeline, row_weights: Tensor | None) -> None:
        """Add labels and the quality of the predictions to the steps that they belong to.

        Args:
            line: The stream.
            row_weights: Shape (B,); 1 if None.
        """
        weights = self.mask.float()
        if row_weights is not None:
            weights = weights * row_weights.to(weights.device).float().repeat_interleave(self.places)
        for step in np.unique(self.steps).tolist():
            line.expect(step)
            offset = torch.as_tensor(line.forecast(step).prior, device=self.raw.device).log().float()
            if bool((self.steps == step).all()):
                scored = Scored(self.raw, offset, self.shares, weights)
            else:
                rows = torch.as_tensor(self.steps == step, device=self.raw.device).repeat_interleave(self.places)
                scored = Scored(self.raw[rows], offset, self.shares[rows], weights[rows])
            line.tally.add(step, scored)

    def remember(self, memory: Memory) -> None:
        """Scores and labels for the gate of :mod:`groundwire_limes.unlabelled`."""
        steps = np.repeat(self.steps, self.places)
        kept, labels = self.mask.cpu().numpy(), self.shares.argmax(dim=1).cpu().numpy()
        for step in np.unique(steps).tolist():
            if memory.wants(step):
                rows = kept & (steps == step)
                raw = self.raw[torch.as_tensor(rows, device=self.raw.device)]
                memory.learn(step, raw.cpu().numpy(), labels[rows])


def weights_of(where: str | Callable[[Any], Any] | None, batch: Any) -> Tensor | None:
    """Weight of each row of a batch in the counts, shape (B,); None if all are 1.

    Args:
        where: A key of the batch, or ``where(batch)``; None for no weights.
        batch: As the loader gave it.

    Raises:
        PluginError: They are not there, or one is negative or not finite.
    """
    if where is None:
        return None
    found = where(batch) if callable(where) else times_of(where, batch, Fields(None))
    if found is None:
        raise PluginError(f"limes: no weights {where!r} in a training batch -> LIMES(weights='their key')")
    weights = torch.as_tensor(found).reshape(-1)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise PluginError("limes: a row's weight is negative or not finite -> weights are at least 0")
    return weights
