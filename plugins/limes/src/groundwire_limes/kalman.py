"""A Kalman filter on log-priors: a level that walks and, if the period is known, harmonics of it. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groundwire_limes.functional import Array, softmax

#: Variance per step of the walk of the level, and of each harmonic's coefficients.
LEVEL_NOISE, SEASON_NOISE = 0.02, 0.0005
#: Observation noise beside that of counting.
EXTRA_NOISE = 0.005
HARMONICS = 3


@dataclass(frozen=True)
class KalmanFilter:
    """The filter after some rows. Replaced, never changed, so that keeping an old one costs nothing.

    Attributes:
        step: Of the last row.
        mean: Coefficients, shape (K, D): the level, then cosine and sine of each harmonic.
        cov: Their covariances, shape (K, D, D).
        period: Steps of a season, or None.
    """

    step: int
    mean: Array
    cov: Array
    period: int | None

    @classmethod
    def start(cls, step: int, prior: Array, size: float, period: int | None) -> KalmanFilter:
        """Return the filter after a first row, whose log-prior is the level."""
        dims = 1 + 2 * harmonics(period)
        mean = np.zeros((len(prior), dims))
        mean[:, 0] = centered(prior)
        variances = np.full(dims, 0.3)
        cov = np.repeat(np.diag(variances)[None], len(prior), axis=0)
        cov[:, 0, 0] = observation_noise(prior, size)
        return cls(step, mean, cov, period)

    def updated(self, step: int, prior: Array, size: float) -> KalmanFilter:
        """Return the filter after one more row: ``prior`` from ``size`` labels at ``step``."""
        h = regressors(step, self.period)
        walk = np.full(len(h), SEASON_NOISE)
        walk[0] = LEVEL_NOISE
        cov = self.cov + np.diag(walk * (step - self.step))
        spread = cov @ h
        gain = spread / (spread @ h + observation_noise(prior, size))[:, None]
        mean = self.mean + gain * (centered(prior) - self.mean @ h)[:, None]
        return KalmanFilter(step, mean, cov - gain[:, :, None] * spread[:, None, :], self.period)

    def forecast(self, step: int) -> Array:
        """Return the prior that is expected at ``step``."""
        return softmax(self.mean @ regressors(step, self.period))


def harmonics(period: int | None) -> int:
    """Return how many harmonics a period of that many steps can have, at most 3.

    Example:
        >>> harmonics(24), harmonics(3), harmonics(None)
        (3, 1, 0)
    """
    return 0 if period is None else min(HARMONICS, (period - 1) // 2)


def regressors(step: int, period: int | None) -> Array:
    """Return what the coefficients are multiplied with at ``step``; shape (D,)."""
    if period is None:
        return np.ones(1)
    angles = 2 * np.pi * (step % period) / period * np.arange(1, harmonics(period) + 1)
    return np.concatenate([np.ones(1), np.stack([np.cos(angles), np.sin(angles)], axis=1).ravel()])


def centered(prior: Array) -> Array:
    """Return the log-prior, centred over the classes."""
    logs = np.log(prior)
    result: Array = logs - logs.mean()
    return result


def observation_noise(prior: Array, size: float) -> Array:
    """Return the variance of the logarithm of a frequency from ``size`` labels, by the delta method."""
    noise: Array = 1 / (size * prior) + EXTRA_NOISE
    return noise
