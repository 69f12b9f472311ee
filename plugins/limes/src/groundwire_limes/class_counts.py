"""Label counts and prequential quality of each time step: training batches, judged before they were learned from."""

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

#: Quality waits until so many batches or scores came together: alone in a training step, each operation costs more.
BATCHES, SCORES = 16, 2**20


@dataclass(frozen=True)
class Predictions:
    """Predictions that were made before their labels were learned from.

    Attributes:
        scores: Raw, (N, K), float32.
        offset: Of the scores, (K,).
        labels: Theirs.
        weights: Of the predictions, (N,), float64 where the device has it; 0 for masked ones.
    """

    scores: Tensor
    offset: Tensor
    labels: Labels
    weights: Tensor

    def rows(self, which: Tensor) -> Predictions:
        """Return some of them."""
        return Predictions(self.scores[which], self.offset, self.labels.rows(which), self.weights[which])

    def quality(self) -> Tensor:
        """Return sums over the predictions, shape (5,), in the dtype of the weights.

        Labels, hits, hits without offset, log-loss, log-loss without offset.
        """
        hard, best = self.labels.hard, top_class(self.scores)
        corrected_loss, loss = self._losses(best[:, None])
        columns = [
            torch.ones_like(loss),
            (top_class(self.scores + self.offset) == hard).float(),
            (best == hard).float(),
            corrected_loss,
            loss,
        ]
        return torch.stack(columns).to(self.weights.dtype) @ self.weights

    def _losses(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropies with and without offset, shape (N,), from one softmax q: exponentials are what costs.

        Without offset, ``max z - log max q`` is the logarithm of the normaliser, and with offset c that plus
        ``log sum q exp c``, where the largest q is at least 1/K, so that nothing underflows.
        """
        shares = self.scores.softmax(dim=1)
        gap = self.scores.gather(1, best).squeeze(1) - self.labels.pick(self.scores)
        loss = gap - shares.gather(1, best).squeeze(1).log()
        return loss + (shares @ self.offset.exp()).log() - self.labels.pick(self.offset), loss

    @classmethod
    def concatenated(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return those of several batches with the same offset, one after the other."""
        if len(parts) == 1:
            return parts[0]
        labels = Labels.concatenated([p.labels for p in parts])
        scores, weights = torch.cat([p.scores for p in parts]), torch.cat([p.weights for p in parts])
        return cls(scores, parts[0].offset, labels, weights)


def top_class(scores: Tensor) -> Tensor:
    """Return the class of the largest score, the first of several, shape (N,). NumPy is faster on the CPU."""
    return torch.from_numpy(scores.numpy().argmax(axis=1)) if scores.device.type == "cpu" else scores.argmax(dim=1)


def accumulation_dtype(device: torch.device | str) -> torch.dtype:
    """Return float64, or float32 for a device without it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class ClassCounts:
    """Counts and quality by step: ``known`` on all ranks, ``pending`` on this one only, on the device, not yet summed.

    Args:
        classes: Number of classes K.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.known: dict[int, Array] = {}
        self._counts: dict[int, Tensor] = {}
        self._quality: dict[int, Tensor] = {}
        self._waiting: list[tuple[int, Predictions]] = []
        self._scores = 0

    def add(self, step: int, predictions: Predictions) -> None:
        """Add a batch's predictions to ``step``."""
        self._counts[step] = predictions.labels.counts(predictions.weights, onto=self._counts.get(step))
        if predictions.scores.is_cuda:  # a CUDA graph writes the next batch's scores over these
            predictions = replace(predictions, scores=predictions.scores.clone())
        self._waiting.append((step, predictions))
        self._scores += predictions.scores.numel()
        if len(self._waiting) >= BATCHES or self._scores >= SCORES:
            self._evaluate()

    def _evaluate(self) -> None:
        def alike(waiting: tuple[int, Predictions]) -> tuple[int, int, tuple[bool, bool]]:
            step, predictions = waiting
            return step, id(predictions.offset), predictions.labels.kind

        for (step, *_), parts in groupby(self._waiting, alike):
            _add(self._quality, step, Predictions.concatenated([p for _, p in parts]).quality())
        self._waiting, self._scores = [], 0

    def pending(self, step: int) -> Tensor | None:
        """Return this rank's label counts of ``step`` that are not in ``known`` yet."""
        return self._counts.get(step)

    def counts(self, step: int) -> Array:
        """Return the label counts of ``step`` that all ranks know of."""
        known = self.known.get(step)
        return np.zeros(self.classes) if known is None else known[: self.classes]

    def gather(self, all_gather: Callable[[Any], Iterable[Any]]) -> dict[int, Array]:
        """Sum what is pending over all ranks into ``known``.

        Args:
            all_gather: Returns the value of every rank; called on all ranks.

        Returns:
            The label counts that were added, by step.
        """
        self._evaluate()
        own = {s: torch.cat([row, self._quality[s]]).cpu().double().numpy() for s, row in self._counts.items()}
        self._counts, self._quality = {}, {}
        added: dict[int, Array] = {}
        for rows in all_gather(own):
            for step, row in rows.items():
                _add(added, step, row)
        for step, row in added.items():
            _add(self.known, step, row)
        return {step: added[step][: self.classes] for step in sorted(added)}

    def quality(self, step: int) -> dict[str, float]:
        """Return means of ``step``: ``labels`` and, if there are any, accuracy and log-loss with and without offset."""
        labels, *sums = self.known[step][self.classes :].tolist()
        names = ("accuracy", "uncorrected_accuracy", "loss", "uncorrected_loss")
        return {"labels": labels} | ({n: v / labels for n, v in zip(names, sums, strict=True)} if labels else {})


def _add(rows: dict[int, Any], step: int, row: Any) -> None:
    rows[step] = rows[step] + row if step in rows else row
