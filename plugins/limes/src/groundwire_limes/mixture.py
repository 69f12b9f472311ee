"""The mixture of experts behind "auto": weights by past log-loss, and the guard of the long-run prior. NumPy only.

A mixture is kept for every horizon that is asked for: who is best one step ahead need not be best a day ahead. But what
was forecast a day ahead, before the stream changed, says nothing of who is best after it, and a day passes until
something does. Until then it has the weights of the next step's mixture, which stands at the same slot of the season.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from groundwire_limes.functional import Array, geometric_mixture, limited_log_odds_move, log_loss

#: Learning rate per step of mean log-loss per label, and share that flows between the experts (Herbster and Warmuth).
LEARNING_RATE, FIXED_SHARE = 5.0, 0.01
#: Rows over which forecasts are compared, and how many are needed to judge.
WINDOW, ENOUGH = 24, 3
#: Standard errors at which the guard begins to trust the mixture, and the mixture its leader.
GUARD_ERRORS, LEADER_ERRORS = 0.0, 0.5

#: Horizons that have a mixture; others use the next smaller one.
HORIZONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 168)
#: Standard deviations by which a divergence exceeds those before it at a change point, and how many it takes to tell.
CHANGE_DEVIATIONS, FEWEST = 4.0, 6


def is_whole_seasons_later(ahead: int, period: int | None) -> bool:
    """Tell whether ``ahead`` is whole seasons later than the next step.

    Example:
        >>> is_whole_seasons_later(25, 24), is_whole_seasons_later(24, 24), is_whole_seasons_later(1, 24)
        (True, False, False)
    """
    return period is not None and ahead > 1 and (ahead - 1) % period == 0


def mixture_horizon(ahead: int, period: int | None = None) -> int:
    """Return the horizon whose mixture serves for ``ahead``, in seasons of ``period`` steps.

    Example:
        >>> mixture_horizon(1), mixture_horizon(5), mixture_horizon(25), mixture_horizon(25, period=24)
        (1, 4, 24, 25)
    """
    exact = ahead <= HORIZONS[-1] + 1 and is_whole_seasons_later(ahead, period)
    return ahead if exact else max(h for h in HORIZONS if h <= ahead)


def is_change_point(divergence: float, before: Sequence[float]) -> bool:
    """Tell whether a forecast of the next step failed as it never did ``before``.

    Args:
        divergence: Of the forecast from what was observed, in nats.
        before: Those of the last rows.

    Example:
        >>> usual = [0.02, 0.03, 0.02, 0.01, 0.02, 0.03]
        >>> is_change_point(1.5, usual), is_change_point(0.03, usual)
        (True, False)
    """
    return len(before) >= FEWEST and bool(divergence > np.mean(before) + CHANGE_DEVIATIONS * np.std(before, ddof=1))


def confidence(gains: Array, threshold: float) -> float:
    """Return 0 while the mean of ``gains`` is at most ``threshold`` standard errors, and 1 from one more on.

    Example:
        >>> confidence(np.array([1.0, 1.1, 0.9]), 1.0), confidence(np.array([1.0, -1.1, 0.9]), 1.0)
        (1.0, 0.0)
    """
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    if error == 0:
        return float(gains.mean() > 0)
    return float(np.clip(gains.mean() / error - threshold, 0, 1))


@dataclass(frozen=True)
class Mixture:
    """The experts' mixture for one horizon. Replaced, never changed.

    Attributes:
        weights: Of the M experts, shape (M,), summing to 1.
        losses: Log-losses of the last R rows, newest last: of experts, pool and long-run prior; (R, M + 2) or None.
        pending: Experts' forecasts of rows to come: step -> (M, K).
        last: The last forecast, which limits how far the next one may move; None before the first.
    """

    weights: Array
    losses: Array | None = None
    pending: Mapping[int, Array] = field(default_factory=dict)
    last: Array | None = None

    def pool(self, predictions: Array) -> Array:
        """Return the linear pool of ``predictions`` (M, K), drawn to one expert if that beats the pool beyond doubt."""
        pooled = self.weights @ predictions
        pooled = pooled / pooled.sum()
        if self.losses is None or len(self.losses) < ENOUGH:
            return np.asarray(pooled)
        leader = int(self.losses[:, :-2].mean(axis=0).argmin())
        lead = confidence(self.losses[:, -2] - self.losses[:, leader], LEADER_ERRORS)
        return geometric_mixture(predictions[leader], pooled, lead) if lead else np.asarray(pooled)

    @cached_property
    def trust(self) -> float:
        """Return the share of the way from the long-run prior to the pool that the guard allows, in [0, 1]."""
        if self.losses is None or len(self.losses) < ENOUGH:
            return 1.0
        return confidence(self.losses[:, -1] - self.losses[:, -2], GUARD_ERRORS)

    def forecast(self, predictions: Array, long_run: Array, max_move: float) -> Array:
        """Return the guarded pool, moved at most ``max_move`` in log-odds from the last forecast."""
        guarded = geometric_mixture(self.pool(predictions), long_run, self.trust)
        before = np.full(len(long_run), 1 / len(long_run)) if self.last is None else self.last
        return limited_log_odds_move(guarded, before, max_move)

    def updated(self, predictions: Array, long_run: Array, observed: Array, forecast: Array) -> Mixture:
        """Return the mixture after ``observed`` frequencies (K,) met the ``predictions`` and ``forecast`` of them."""
        pool = self.weights @ predictions
        losses = log_loss(np.concatenate([predictions, [pool, long_run]]), observed)
        raised = self.weights * np.exp(-LEARNING_RATE * (losses[:-2] - losses[:-2].min()))
        weights = (1 - FIXED_SHARE) * raised / raised.sum() + FIXED_SHARE / len(raised)
        past = losses[None] if self.losses is None else np.concatenate([self.losses[1 - WINDOW :], losses[None]])
        return Mixture(weights, past, self.pending, forecast)

    def weighted_as(self, other: Mixture) -> Mixture:
        """Return this mixture with the experts judged by how they did at the horizon of ``other``."""
        return replace(self, weights=other.weights, losses=other.losses)
