"""What the training batches showed of each step: label counts and prequential quality, summed over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_limes.functional import Array
from groundwire_limes.labels import Labels

#: Sums beside the label counts: labels, hits, hits without correction, log-loss, log-loss without correction.
QUALITY = 5
#: Quality waits until so many batches or scores came together: alone in a training step, each operation costs more.
BATCHES, SCORES = 16, 2**20


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
        hard, best = self.labels.hard, top(self.scores)
        corrected_loss, loss = self._losses(best[:, None])
        columns = [
            torch.ones_like(loss),
            (top(self.scores + self.offset) == hard).float(),
            (best == hard).float(),
            corrected_loss,
            loss,
        ]
        return torch.stack(columns).to(self.weights.dtype) @ self.weights

    def _losses(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies with and without offset, shape (N,), from one softmax q: exponentials are what costs.

        Without offset, ``max z - log max q`` is the logarithm of the normaliser, and with offset c that plus
        ``log sum q exp c``, where the largest q is at least 1/K, so that nothing underflows.
        """
        shares = self.scores.softmax(dim=1)
        gap = self.scores.gather(1, best).squeeze(1) - self.labels.pick(self.scores)
        loss = gap - shares.gather(1, best).squeeze(1).log()
        return loss + (shares @ self.offset.exp()).log() - self.labels.pick(self.offset), loss

    @classmethod
    def joined(cls, parts: Sequence[Scored]) -> Scored:
        """One after the other, where all were corrected by the same offset."""
        if len(parts) == 1:
            return parts[0]
        labels = Labels.joined([p.labels for p in parts])
        scores, weights = torch.cat([p.scores for p in parts]), torch.cat([p.weights for p in parts])
        return cls(scores, parts[0].offset, labels, weights)


def top(scores: Tensor) -> Tensor:
    """Class of the largest score, the first of several, shape (N,). NumPy is faster on the CPU."""
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
        self._counts: dict[int, Tensor] = {}
        self._quality: dict[int, Tensor] = {}
        self._waiting: list[tuple[int, Scored]] = []
        self._scores = 0

    def add(self, step: int, scored: Scored) -> None:
        """Add a batch's predictions to ``step``."""
        self._counts[step] = scored.labels.counts(scored.weights, onto=self._counts.get(step))
        if scored.scores.is_cuda:  # a CUDA graph writes the next batch's scores over these
            scored = replace(scored, scores=scored.scores.clone())
        self._waiting.append((step, scored))
        self._scores += scored.scores.numel()
        if len(self._waiting) >= BATCHES or self._scores >= SCORES:
            self._evaluate()

    def _evaluate(self) -> None:
        for (step, *_), alike in groupby(self._waiting, _likeness):
            _add(self._quality, step, Scored.joined([scored for _, scored in alike]).quality())
        self._waiting, self._scores = [], 0

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
        self._evaluate()
        own = {s: torch.cat([row, self._quality[s]]).cpu().double().numpy() for s, row in self._counts.items()}
        self._counts, self._quality = {}, {}
        added: dict[int, Array] = {}
        for rows in gather(own):
            for step, row in rows.items():
                _add(added, step, row)
        for step, row in added.items():
            _add(self.known, step, row)
        return {step: added[step][: self.classes] for step in sorted(added)}

    def quality(self, step: int) -> dict[str, float]:
        """Means of ``step``: ``labels`` and, if there are any, accuracies and log-losses with and without offset."""
        labels, *sums = self.known[step][self.classes :].tolist()
        names = ("accuracy", "uncorrected_accuracy", "loss", "uncorrected_loss")
        return {"labels": labels} | ({n: v / labels for n, v in zip(names, sums, strict=True)} if labels else {})


def _likeness(waiting: tuple[int, Scored]) -> tuple[int, int, tuple[bool, bool]]:
    step, scored = waiting
    return step, id(scored.offset), scored.labels.kind


def _add(rows: dict[int, Any], step: int, row: Any) -> None:
    rows[step] = rows[step] + row if step in rows else row
