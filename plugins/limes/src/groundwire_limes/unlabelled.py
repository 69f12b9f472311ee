"""Adapting to batches without labels, behind a gate that past labels hold open or shut.

The gate replays recent labelled steps as if their labels had been missing: it calibrates the scores on the older ones,
and on the newer ones compares the log-loss under the forecast with that under MAP-EM around the forecast, as far ahead
as is asked for now. If MAP-EM was not better, the forecast stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundwire_limes.em import Calibration, calibrated, label_loss, map_em
from groundwire_limes.extrapolator import PriorExtrapolator
from groundwire_limes.functional import Array, smoothed

#: Labelled steps that are remembered, rows of each, and how many steps the gate needs.
STEPS, ROWS, ENOUGH = 24, 256, 8
#: How many labels the forecast may be worth against the batch.
STRENGTHS = (100.0, 300.0, 1000.0)


@dataclass(frozen=True)
class Gate:
    """What past labels say of MAP-EM.

    Attributes:
        gain: Mean decrease of the log-loss by MAP-EM on past steps, in nats.
        strength: Of the forecast, in labels; the best one on past steps.
        calibration: Of the scores.
    """

    gain: float
    strength: float
    calibration: Calibration

    @property
    def is_open(self) -> bool:
        """Whether MAP-EM helped."""
        return self.gain > 0

    def prior(self, scores: Array, center: Array) -> Array:
        """The prior of a batch of raw ``scores`` (N, K) around the forecast ``center``."""
        return map_em(self.calibration(scores), center, self.strength) if self.is_open else center


class Memory:
    """Scores and labels of recent steps, in the order in which they came."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[Array, Array]] = {}
        self._gates: dict[tuple[int, int, int], Gate | None] = {}

    def wants(self, step: int) -> bool:
        """Whether there is room for more rows of ``step``."""
        return step not in self.steps or len(self.steps[step][1]) < ROWS

    def learn(self, step: int, scores: Any, labels: Any) -> None:
        """Remember raw scores (N, K), made before their labels (N,) were learned from."""
        scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
        before = self.steps.get(step)
        if before is not None:
            scores, labels = np.concatenate([before[0], scores]), np.concatenate([before[1], labels])
        self.steps[step] = (scores[:ROWS], labels[:ROWS])
        for old in sorted(self.steps)[:-STEPS]:
            del self.steps[old]
        self._gates = {}

    def gate(self, extrapolator: PriorExtrapolator, ahead: int) -> Gate | None:
        """The gate for forecasts ``ahead`` steps ahead; None while too few labelled steps are known."""
        last = extrapolator.last_step
        if last is None:
            return None
        key = (last, ahead, extrapolator.observed)
        if key not in self._gates:
            self._gates[key] = self._judged(extrapolator, ahead)
        return self._gates[key]

    def _judged(self, extrapolator: PriorExtrapolator, ahead: int) -> Gate | None:
        steps = sorted(s for s, (_, labels) in self.steps.items() if len(labels))
        if len(steps) < ENOUGH:
            return None
        older, newer = steps[: len(steps) // 2], steps[len(steps) // 2 :]
        calibration = self._calibrated(older, extrapolator.num_classes)
        gains = np.zeros((len(newer), len(STRENGTHS)))
        for i, step in enumerate(newer):
            scores, labels = self.steps[step]
            center = extrapolator.forecast(step, known=step - ahead)
            plain, tuned = label_loss(scores, center, labels), calibration(scores)
            for j, strength in enumerate(STRENGTHS):
                gains[i, j] = plain - label_loss(scores, map_em(tuned, center, strength), labels)
        best = int(gains.mean(axis=0).argmax())
        return Gate(float(gains[:, best].mean()), STRENGTHS[best], calibration)

    def _calibrated(self, steps: list[int], classes: int) -> Calibration:
        scores, labels = (np.concatenate([self.steps[s][i] for s in steps]) for i in (0, 1))
        priors = [np.log(smoothed(np.bincount(self.steps[s][1], minlength=classes))) for s in steps]
        offsets = np.repeat(priors, [len(self.steps[s][1]) for s in steps], axis=0)
        return calibrated(scores, offsets, labels)

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"steps": [[s, z.tolist(), y.tolist()] for s, (z, y) in self.steps.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.steps = {int(s): (np.array(z, np.float64), np.array(y, np.int64)) for s, z, y in state["steps"]}
        self._gates = {}
