r"""The prior of a batch without labels, from what a classifier says of it. NumPy only.

With q the class probabilities under equal classes, maximum a posteriori expectation maximisation (Saerens et al., 2002,
with a Dirichlet prior) repeats

.. math:: r_{ik} \propto q_{ik}\, p_k, \qquad p_k = \frac{\sum_i r_{ik} + s\, m_k}{N + s}

where m is the forecast and s says how many labels it is worth. It needs calibrated scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groundwire_limes.functional import FLOOR, Array, softmax


def map_em(scores: Array, center: Array, strength: float, iterations: int = 30) -> Array:
    """The prior of a batch, between ``center`` and what its scores say.

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
        joint = likelihood * prior
        shares = joint / np.maximum(joint.sum(axis=1, keepdims=True), FLOOR)
        prior = (shares.sum(axis=0) + strength * center) / (len(scores) + strength)
    positive: Array = np.maximum(prior, FLOOR)
    return np.asarray(positive / positive.sum())


@dataclass(frozen=True)
class Calibration:
    """Bias-corrected temperature scaling (Alexandari et al., 2020): ``z / temperature + bias``."""

    temperature: float
    bias: Array

    def __call__(self, scores: Array) -> Array:
        """Calibrated scores, (N, K)."""
        scaled: Array = scores / self.temperature + self.bias
        return scaled


def calibrated(scores: Array, offsets: Array, labels: Array, rounds: int = 6) -> Calibration:
    """The calibration that fits past labels best.

    Args:
        scores: Raw logits (N, K).
        offsets: Log-priors that held when the labels came, (N, K).
        labels: Class indices (N,).
        rounds: Of fitting bias and temperature in turn.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.standard_normal((4000, 3))
        >>> labels = np.array([rng.choice(3, p=softmax(z)) for z in truth])
        >>> fit = calibrated(4 * truth, np.zeros((4000, 3)), labels)
        >>> 3 < fit.temperature < 5
        True
    """
    classes = scores.shape[1]
    frequency = (np.bincount(labels, minlength=classes) + 1) / (len(labels) + classes)
    inverse, bias = 1.0, np.zeros(classes)
    for _ in range(rounds):
        expected = (softmax(scores * inverse + bias + offsets).sum(axis=0) + 1) / (len(labels) + classes)
        bias = bias + np.log(frequency) - np.log(expected)
        inverse = _best_inverse(scores, bias + offsets, labels, inverse)
    return Calibration(1 / inverse, bias - bias.mean())


def _best_inverse(scores: Array, shift: Array, labels: Array, start: float) -> float:
    """One over the temperature of least log-loss, by Newton's method on its logarithm's neighbourhood."""
    rows = np.arange(len(labels))
    inverse = start
    for _ in range(3):
        p = softmax(scores * inverse + shift)
        mean = (p * scores).sum(axis=1)
        slope = (mean - scores[rows, labels]).mean()
        curve = ((p * scores**2).sum(axis=1) - mean**2).mean()
        inverse = float(np.clip(inverse - slope / max(curve, FLOOR), 0.2 * inverse, 5 * inverse))
    return float(np.clip(inverse, 0.05, 20))


def label_loss(scores: Array, prior: Array, labels: Array) -> float:
    """Mean log-loss of ``labels`` under ``softmax(scores + log prior)``, in nats."""
    corrected = scores + np.log(np.maximum(prior, FLOOR))
    top = corrected.max(axis=1)
    total = np.log(np.exp(corrected - top[:, None]).sum(axis=1)) + top
    return float((total - corrected[np.arange(len(labels)), labels]).mean())
