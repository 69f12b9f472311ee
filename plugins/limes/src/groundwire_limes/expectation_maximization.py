r"""The class prior of a batch without labels, from its scores. NumPy only.

With q the class probabilities under equal classes, maximum a posteriori expectation maximisation (Saerens et al., 2002,
with a Dirichlet prior) repeats

.. math:: r_{ik} \propto q_{ik}\, p_k, \qquad p_k = \frac{\sum_i r_{ik} + s\, m_k}{N + s}

where m is the forecast and s says how many labels it is worth. It needs calibrated scores, so it stands behind a gate:
recent labelled steps are replayed as if their labels had been missing. Scores are calibrated on the older ones, and on
the newer ones the log-loss under the forecast is compared with that under MAP-EM around it, as far ahead as is asked
for now. If MAP-EM was not better, the forecast stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundwire_limes.extrapolator import PriorExtrapolator
from groundwire_limes.functional import FLOOR, Array, laplace_smoothed, softmax

#: Labelled steps that are remembered, rows of each, and how many steps the gate needs.
STEPS, ROWS, ENOUGH = 24, 256, 8
#: How many labels the forecast may be worth against the batch.
STRENGTHS = (100.0, 300.0, 1000.0)


def map_em(scores: Array, center: Array, strength: float, iterations: int = 30) -> Array:
    """Return the prior of a batch, between ``center`` and what its scores say.

    Args:
        scores: Calibrated logits under equal classes, (N, K).
        center: The forecast, (K,).
        strength: s, in labels; 0 for plain EM.
        iterations: How often.

    Returns:
        Shape (K,), positive, sums to 1.

    Example:
        >>> scores = np.log([[0.9, 0.1]] * 3)
        >>> map_em(scores, np.array([0.5, 0.5]), strength=1e9).round(3).tolist()
        [0.5, 0.5]
        >>> bool(map_em(scores, np.array([0.5, 0.5]), strength=1.0)[0] > 0.8)
        True
    """
    likelihood = np.exp(scores - scores.max(axis=1, keepdims=True))
    prior = np.array(center)
    for _ in range(iterations):
        joint = likelihood * prior  # expectation
        shares = joint / np.maximum(joint.sum(axis=1, keepdims=True), FLOOR)
        prior = (shares.sum(axis=0) + strength * center) / (len(scores) + strength)  # maximisation
    positive: Array = np.maximum(prior, FLOOR)
    return np.asarray(positive / positive.sum())


@dataclass(frozen=True)
class Calibration:
    """Bias-corrected temperature scaling (Alexandari et al., 2020): ``z / temperature + bias``."""

    temperature: float
    bias: Array

    def __call__(self, scores: Array) -> Array:
        """Return calibrated scores, (N, K)."""
        scaled: Array = scores / self.temperature + self.bias
        return scaled


def fit_calibration(scores: Array, offsets: Array, labels: Array, rounds: int = 6) -> Calibration:
    """Return the calibration that fits past labels best.

    Args:
        scores: Raw logits (N, K).
        offsets: Log-priors that held when the labels came, (N, K).
        labels: Class indices (N,).
        rounds: Of fitting bias and temperature in turn.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.standard_normal((4000, 3))
        >>> labels = np.array([rng.choice(3, p=softmax(z)) for z in truth])
        >>> fit = fit_calibration(4 * truth, np.zeros((4000, 3)), labels)
        >>> 3 < fit.temperature < 5
        True
    """
    classes = scores.shape[1]
    frequency = (np.bincount(labels, minlength=classes) + 1) / (len(labels) + classes)
    inverse, bias = 1.0, np.zeros(classes)
    for _ in range(rounds):
        expected = (softmax(scores * inverse + bias + offsets).sum(axis=0) + 1) / (len(labels) + classes)
        bias = bias + np.log(frequency) - np.log(expected)
        inverse = _best_inverse_temperature(scores, bias + offsets, labels, inverse)
    return Calibration(1 / inverse, bias - bias.mean())


def _best_inverse_temperature(scores: Array, shift: Array, labels: Array, start: float) -> float:
    """Return the inverse temperature of least log-loss, by three steps of Newton's method, each at most fivefold."""
    rows = np.arange(len(labels))
    inverse = start
    for _ in range(3):
        p = softmax(scores * inverse + shift)
        mean = (p * scores).sum(axis=1)
        slope = (mean - scores[rows, labels]).mean()
        curve = ((p * scores**2).sum(axis=1) - mean**2).mean()
        inverse = float(np.clip(inverse - slope / max(curve, FLOOR), 0.2 * inverse, 5 * inverse))
    return float(np.clip(inverse, 0.05, 20))


def cross_entropy(scores: Array, prior: Array, labels: Array) -> float:
    """Return the mean log-loss of ``labels`` under ``softmax(scores + log prior)``, in nats."""
    corrected = scores + np.log(np.maximum(prior, FLOOR))
    top = corrected.max(axis=1)
    total = np.log(np.exp(corrected - top[:, None]).sum(axis=1)) + top
    return float((total - corrected[np.arange(len(labels)), labels]).mean())


@dataclass(frozen=True)
class Gate:
    """Verdict of past labels on MAP-EM.

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
        """Tell whether MAP-EM helped."""
        return self.gain > 0

    def prior(self, scores: Array, center: Array) -> Array:
        """Return the prior of a batch of raw ``scores`` (N, K) around the forecast ``center``."""
        return map_em(self.calibration(scores), center, self.strength) if self.is_open else center


class LabelledScores:
    """Scores and labels of recent steps, in the order in which they came, and the gate that follows from them."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[Array, Array]] = {}
        self._gates: dict[tuple[int, int, int], Gate | None] = {}

    def has_room(self, step: int) -> bool:
        """Tell whether more rows of ``step`` would be kept."""
        return step not in self.steps or len(self.steps[step][1]) < ROWS

    def add(self, step: int, scores: Any, labels: Any) -> None:
        """Keep raw scores (N, K), made before their labels (N,) were learned from."""
        scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
        before = self.steps.get(step)
        if before is not None:
            scores, labels = np.concatenate([before[0], scores]), np.concatenate([before[1], labels])
        self.steps[step] = (scores[:ROWS], labels[:ROWS])
        for old in sorted(self.steps)[:-STEPS]:
            del self.steps[old]
        self._gates = {}

    def gate(self, extrapolator: PriorExtrapolator, ahead: int) -> Gate | None:
        """Return the gate for forecasts ``ahead`` steps ahead; None while too few labelled steps are known."""
        last = extrapolator.last_step
        if last is None:
            return None
        key = (last, ahead, extrapolator.observed)
        if key not in self._gates:
            self._gates[key] = self._replayed(extrapolator, ahead)
        return self._gates[key]

    def _replayed(self, extrapolator: PriorExtrapolator, ahead: int) -> Gate | None:
        steps = sorted(s for s, (_, labels) in self.steps.items() if len(labels))
        if len(steps) < ENOUGH:
            return None
        older, newer = steps[: len(steps) // 2], steps[len(steps) // 2 :]
        calibration = self._calibration(older, extrapolator.num_classes)
        gains = np.zeros((len(newer), len(STRENGTHS)))
        for i, step in enumerate(newer):
            scores, labels = self.steps[step]
            center = extrapolator.forecast(step, known=step - ahead)
            plain, tuned = cross_entropy(scores, center, labels), calibration(scores)
            for j, strength in enumerate(STRENGTHS):
                gains[i, j] = plain - cross_entropy(scores, map_em(tuned, center, strength), labels)
        best = int(gains.mean(axis=0).argmax())
        return Gate(float(gains[:, best].mean()), STRENGTHS[best], calibration)

    def _calibration(self, steps: list[int], classes: int) -> Calibration:
        scores, labels = (np.concatenate([self.steps[s][i] for s in steps]) for i in (0, 1))
        priors = [np.log(laplace_smoothed(np.bincount(self.steps[s][1], minlength=classes))) for s in steps]
        offsets = np.repeat(priors, [len(self.steps[s][1]) for s in steps], axis=0)
        return fit_calibration(scores, offsets, labels)

    def state_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {"steps": [[s, z.tolist(), y.tolist()] for s, (z, y) in self.steps.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.steps = {int(s): (np.array(z, np.float64), np.array(y, np.int64)) for s, z, y in state["steps"]}
        self._gates = {}
