"""What the training batches showed of each step: label counts and prequential quality, summed over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_limes.functional import Array

#: Sums beside the label counts: labels, hits, hits without correction, log-loss, log-loss without correction.
QUALITY = 5
#: Batches whose quality is computed together: one by one, a small model would notice.
TOGETHER = 16


@dataclass(frozen=True)
class Scored:
    """Predictions that were made before their labels were learned from.

    Attributes:
        scores: Raw, (N, K), float32.
        offset: What corrects them, (K,) or (N, K).
        shares: Labels as class shares (N, K).
        weights: Of the predictions, (N,); 0 for masked ones.
    """

    scores: Tensor
    offset: Tensor
    shares: Tensor
    weights: Tensor


def quality(batches: list[Scored]) -> Tensor:
    """Sums over ``batches``, shape (5,), float64 where the device has it."""
    scores, shares, weights = (
        torch.cat([getattr(b, name) for b in batches]) for name in ("scores", "shares", "weights")
    )
    corrected = torch.cat([b.scores + b.offset for b in batches])
    labels = shares.argmax(dim=1)
    columns = [
        torch.ones_like(weights),
        (corrected.argmax(dim=1) == labels).float(),
        (scores.argmax(dim=1) == labels).float(),
        -(torch.log_softmax(corrected, dim=1) * shares).sum(dim=1),
        -(torch.log_softmax(scores, dim=1) * shares).sum(dim=1),
    ]
    return (torch.stack(columns).to(exact(scores)) * weights).sum(dim=1)


def exact(tensor: Tensor) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class Tally:
    """Counts and quality by step: ``known`` on all ranks, ``pending`` on this one only, on the device, not yet summed.

    Args:
        classes: Number of classes K.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.known: dict[int, Array] = {}
        self._counts: dict[int, Tensor] = {}
        self._quality: dict[int, Tensor] = {}
        self._waiting: dict[int, list[Scored]] = {}

    def add(self, step: int, scored: Scored) -> None:
        """Add a batch's predictions to ``step``."""
        row = (scored.shares.to(exact(scored.scores)) * scored.weights[:, None]).sum(dim=0)
        self._counts[step] = self._counts[step] + row if step in self._counts else row
        waiting = self._waiting.setdefault(step, [])
        waiting.append(scored)
        if len(waiting) >= TOGETHER:
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        row = quality(self._waiting.pop(step))
        self._quality[step] = self._quality[step] + row if step in self._quality else row

    def pending(self, step: int) -> Tensor | None:
        """This rank's label counts of ``step`` that are not in ``known`` yet."""
        return self._counts.get(step)

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
        for step in list(self._waiting):
            self._evaluate(step)
        own = {s: torch.cat([row, self._quality[s]]).cpu().double().numpy() for s, row in self._counts.items()}
        self._counts, self._quality = {}, {}
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
