"""What the training batches showed of each step: label counts and prequential quality, summed over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_limes.functional import Array
from groundwire_limes.labels import Labels

#: Sums beside the label counts: labels, hits, hits without correction, log-loss, log-loss without correction.
QUALITY = 5


@dataclass(frozen=True)
class Scored:
    """Predictions that were made before their labels were learned from.

    Attributes:
        scores: Raw, (N, K), float32.
        offset: What corrects them, (K,).
        labels: Theirs.
        weights: Of the predictions, (N,), float64 where the device has it; 0 for masked ones.
    """

    scores: Tensor
    offset: Tensor
    labels: Labels
    weights: Tensor

    def quality(self) -> Tensor:
        """Sums over the predictions, shape (5,), in the dtype of the weights."""
        corrected = self.scores + self.offset
        columns = [
            torch.ones_like(self.offset[:1]).expand(len(corrected)),
            (top(corrected) == self.labels.hard).float(),
            (top(self.scores) == self.labels.hard).float(),
            self.labels.losses(corrected),
            self.labels.losses(self.scores),
        ]
        return torch.stack(columns).to(self.weights.dtype) @ self.weights


def top(scores: Tensor) -> Tensor:
    """Class of the largest score, the first of several, shape (N,). NumPy is five times faster on the CPU."""
    return torch.from_numpy(scores.numpy().argmax(axis=1)) if scores.device.type == "cpu" else scores.argmax(dim=1)


def exact(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class Tally:
    """Counts and quality by step: ``known`` on all ranks, ``pending`` on this one only, on the device, not yet summed.

    Args:
        classes: Number of classes K.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.known: dict[int, Array] = {}
        self._pending: dict[int, Tensor] = {}

    def add(self, step: int, scored: Scored) -> None:
        """Add a batch's predictions to ``step``."""
        row = torch.cat([scored.labels.counts(scored.weights), scored.quality()])
        self._pending[step] = self._pending[step] + row if step in self._pending else row

    def pending(self, step: int) -> Tensor | None:
        """This rank's label counts of ``step`` that are not in ``known`` yet."""
        row = self._pending.get(step)
        return None if row is None else row[: self.classes]

    def counts(self, step: int) -> Array:
        """Label counts of ``step`` that all ranks know of."""
        known = self.known.get(step)
        return np.zeros(self.classes) if known is None else known[: self.classes]

    def drain(self, gather: Callable[[Any], Iterable[Any]]) -> dict[int, Array]:
        """Sum what is pending over all ranks into ``known``.

        Args:
            gather: Returns the value of every rank; called on all ranks.

        Returns:
            The label counts that were added, by step.
        """
        own = {step: row.cpu().double().numpy() for step, row in self._pending.items()}
        self._pending = {}
        added: dict[int, Array] = {}
        for rows in gather(own):
            for step, row in rows.items():
                added[step] = added[step] + row if step in added else row
        for step, row in added.items():
            self.known[step] = self.known[step] + row if step in self.known else row
        return {step: added[step][: self.classes] for step in sorted(added)}

    def quality(self, step: int) -> dict[str, float]:
        """Means of ``step``: ``labels`` and, if there are any, accuracies and log-losses with and without offset."""
        labels, *sums = self.known[step][self.classes :].tolist()
        names = ("accuracy", "uncorrected_accuracy", "loss", "uncorrected_loss")
        return {"labels": labels} | ({n: v / labels for n, v in zip(names, sums, strict=True)} if labels else {})
