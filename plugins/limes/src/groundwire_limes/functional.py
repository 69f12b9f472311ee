r"""The formulas of LIMES, in NumPy: they serve without torch.

A class-prior shift moves p_t(y) and leaves p(x|y) alone. If softmax(z) is the posterior under the reference prior r,
then the posterior under p_t is

.. math:: \mathrm{softmax}(z + c_t), \qquad c_t[k] = \log \hat p_t[k] - \log r[k]

with r uniform here, so c = 0 is the plain model (Tomaszewska and Lampert, 2022). With a trainable bias the choice of r
is immaterial.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

#: No class is believed rarer than this, so that no logarithm is of zero.
FLOOR = 1e-12
#: Largest correction of a logit, in nats.
LIMIT = 12.0


def laplace_smoothed(counts: Any, smoothing: float = 1.0) -> Array:
    """Return class frequencies with ``smoothing`` added to every count (Laplace); float64, over the last axis.

    Example:
        >>> laplace_smoothed([3, 0]).tolist()
        [0.8, 0.2]
    """
    raised = np.asarray(counts, np.float64) + smoothing
    normalised: Array = raised / raised.sum(axis=-1, keepdims=True)
    return normalised


def dirichlet_mean(counts: Array, center: Array, strength: float) -> Array:
    """Return the posterior mean of class frequencies under a Dirichlet prior of mean ``center`` and size ``strength``.

    Example:
        >>> dirichlet_mean(np.array([10.0, 0.0]), np.array([0.5, 0.5]), strength=10).tolist()
        [0.75, 0.25]
    """
    mixed: Array = (counts + strength * center) / (counts.sum() + strength)
    return mixed


def nearest_row(rows: Array, ahead: int = 1) -> int:
    """Return the index of the past row that is most like the last one and whose ``ahead``-th successor is known.

    The published rule (with ``ahead=1``): smallest L1 distance, the oldest of several.

    Args:
        rows: Shape (T, K), T > ``ahead``, oldest first.
        ahead: How many rows after the last one are looked for.

    Example:
        >>> rows = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.8, 0.2]])
        >>> nearest_row(rows)
        0
    """
    return int(np.abs(rows[: len(rows) - ahead] - rows[-1]).sum(axis=1).argmin())


def published_forecast(rows: Array, ahead: int = 1) -> Array:
    """Return the published forecast: the successor of the nearest past row; uniform while fewer than two are known.

    Where no past row has an ``ahead``-th successor yet, the last row.

    Args:
        rows: Shape (T, K), oldest first.
        ahead: How many rows after the last one the forecast is for.
    """
    if len(rows) < 2:
        return np.full(rows.shape[1], 1 / rows.shape[1])
    return np.array(rows[-1] if len(rows) <= ahead else rows[nearest_row(rows, ahead) + ahead])


def log_offset(prior: Any, limit: float = np.inf) -> Array:
    """Return the offset of the logits, ``log prior - log(1/K)``, between ``-limit`` and ``limit``; float64, shape (K,).

    Example:
        >>> log_offset([0.5, 0.5]).tolist()
        [0.0, 0.0]
    """
    prior = np.asarray(prior, np.float64)
    offset: Array = np.clip(np.log(np.maximum(prior, FLOOR)) + np.log(prior.shape[-1]), -limit, limit)
    return offset


def log_loss(prior: Array, frequencies: Array) -> Array:
    """Return the mean log-loss per label of ``frequencies`` under ``prior``, over the last axis, in nats."""
    loss: Array = -(frequencies * np.log(np.maximum(prior, FLOOR))).sum(axis=-1)
    return loss


def kl_divergence(truth: Any, prior: Any) -> float:
    """Return the Kullback-Leibler divergence of ``prior`` from ``truth``, in nats.

    Example:
        >>> kl_divergence([0.5, 0.5], [0.5, 0.5])
        0.0
    """
    truth, prior = np.asarray(truth, np.float64), np.asarray(prior, np.float64)
    seen = truth > 0
    return float((truth[seen] * np.log(truth[seen] / np.maximum(prior[seen], FLOOR))).sum())


def geometric_mixture(prior: Array, center: Array, weight: float) -> Array:
    """Return ``prior ** weight * center ** (1 - weight)``, normalised: from ``center`` (0) to ``prior`` (1).

    Example:
        >>> geometric_mixture(np.array([0.8, 0.2]), np.array([0.5, 0.5]), 0.0).tolist()
        [0.5, 0.5]
    """
    logs = weight * np.log(np.maximum(prior, FLOOR)) + (1 - weight) * np.log(np.maximum(center, FLOOR))
    return softmax(logs)


def softmax(logits: Array) -> Array:
    """Return probabilities along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    normalised: Array = raised / raised.sum(axis=-1, keepdims=True)
    return normalised


def log_odds(prior: Array) -> Array:
    """Return ``log(p / (1 - p))`` of every class."""
    p = np.clip(prior, FLOOR, 1 - FLOOR)
    odds: Array = np.log(p) - np.log1p(-p)
    return odds


def limited_log_odds_move(prior: Array, before: Array, largest: float) -> Array:
    """Return ``prior``, moved towards ``before`` until no log-odds differs from that of ``before`` by over ``largest``.

    It stays on the geometric path between the two. An attacker who floods one class within a step moves
    the forecast by no more than this.

    Example:
        >>> moved = limited_log_odds_move(np.array([0.99, 0.01]), np.array([0.5, 0.5]), largest=1.0)
        >>> round(float(log_odds(moved)[0]), 6)
        1.0
    """
    start = log_odds(before)

    def within(candidate: Array) -> bool:
        return bool(np.abs(log_odds(candidate) - start).max() <= largest)

    if within(prior):
        return prior
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if within(geometric_mixture(prior, before, middle)) else (low, middle)
    return geometric_mixture(prior, before, low) if low else before
