"""Mixing forecasts by their past log-loss, and the guard that steps in where the past is no guide.

A track is kept for every horizon that is asked for: who is best one step ahead need not be best a day ahead. But what
was forecast a day ahead, before the stream changed, says nothing of who is best after it, and a day passes until
something does. Until then the track of the next step, which stands at the same slot of the season, is gone by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from groundwire_limes.functional import Array, limited_move, log_loss, tempered

#: Learning rate per step of mean log-loss per label, and share that flows between the members (Herbster and Warmuth).
RATE, SHARE = 5.0, 0.01
#: Rows over which forecasts are compared, and how many are needed to judge.
WINDOW, ENOUGH = 24, 3
#: Standard errors at which the guard begins to trust the mixture, and the mixture its leader.
GUARD, LEADER = 0.0, 0.5

#: Horizons that have a track; others use the next smaller one.
TRACKED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 168)
#: Standard deviations by which a surprise exceeds those before it if the stream changed, and how many it takes to tell.
CHANGE, FEWEST = 4.0, 6


def whole_seasons_on(ahead: int, period: int | None) -> bool:
    """Whether ``ahead`` is whole seasons later than the next step.

    Example:
        >>> whole_seasons_on(25, 24), whole_seasons_on(24, 24), whole_seasons_on(1, 24), whole_seasons_on(25, None)
        (True, False, False, False)
    """
    return period is not None and ahead > 1 and (ahead - 1) % period == 0


def tracked(ahead: int, period: int | None = None) -> int:
    """The horizon whose track serves for ``ahead``, in seasons of ``period`` steps.

    Example:
        >>> tracked(1), tracked(5), tracked(25), tracked(25, period=24), tracked(1000)
        (1, 4, 24, 25, 168)
    """
    exact = ahead <= TRACKED[-1] + 1 and whole_seasons_on(ahead, period)
    return ahead if exact else max(h for h in TRACKED if h <= ahead)


def is_change(surprise: float, before: Sequence[float]) -> bool:
    """Whether a forecast of the next step failed as it never did ``before``.

    Args:
        surprise: Its divergence from what was observed, in nats.
        before: Those of the last rows.

    Example:
        >>> is_change(1.5, [0.02, 0.03, 0.02, 0.01, 0.02, 0.03]), is_change(0.03, [0.02, 0.03, 0.02, 0.01, 0.02, 0.03])
        (True, False)
    """
    return len(before) >= FEWEST and bool(surprise > np.mean(before) + CHANGE * np.std(before, ddof=1))


def confidence(gains: Array, threshold: float) -> float:
    """0 while the mean of ``gains`` is at most ``threshold`` standard errors, 1 from one more on.

    Example:
        >>> confidence(np.array([1.0, 1.1, 0.9]), 1.0), confidence(np.array([1.0, -1.1, 0.9]), 1.0)
        (1.0, 0.0)
    """
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    if error == 0:
        return float(gains.mean() > 0)
    return float(np.clip(gains.mean() / error - threshold, 0, 1))


@dataclass(frozen=True)
class Track:
    """How the members did at one horizon. Replaced, never changed.

    Attributes:
        weights: Of the members, shape (M,), summing to 1.
        losses: Log-losses of the last R rows, newest last: of members, mixture and long-run prior; (R, M + 2) or None.
        pending: Forecasts of rows to come: step -> (M, K).
        last: The mixture's last forecast, which limits how far the next one may move; None before the first.
    """

    weights: Array
    losses: Array | None = None
    pending: Mapping[int, Array] = field(default_factory=dict)
    last: Array | None = None

    def mixture(self, predictions: Array) -> Array:
        """Linear pool of ``predictions`` (M, K), drawn to one member if that beats the pool beyond doubt."""
        pooled = self.weights @ predictions
        pooled = pooled / pooled.sum()
        if self.losses is None or len(self.losses) < ENOUGH:
            return np.asarray(pooled)
        leader = int(self.losses[:, :-2].mean(axis=0).argmin())
        lead = confidence(self.losses[:, -2] - self.losses[:, leader], LEADER)
        return tempered(predictions[leader], pooled, lead) if lead else np.asarray(pooled)

    @cached_property
    def trust(self) -> float:
        """How far the guard lets the mixture go from the long-run prior: 0 none, 1 all the way."""
        if self.losses is None or len(self.losses) < ENOUGH:
            return 1.0
        return confidence(self.losses[:, -1] - self.losses[:, -2], GUARD)

    def forecast(self, predictions: Array, pooled: Array, max_move: float) -> Array:
        """The guarded mixture, moved at most ``max_move`` in log-odds from the last one."""
        guarded = tempered(self.mixture(predictions), pooled, self.trust)
        before = np.full(len(pooled), 1 / len(pooled)) if self.last is None else self.last
        return limited_move(guarded, before, max_move)

    def scored(self, predictions: Array, pooled: Array, observed: Array, forecast: Array) -> Track:
        """The track after ``observed`` (frequencies, (K,)) met the ``predictions`` and the ``forecast`` made for it."""
        pool = self.weights @ predictions
        losses = log_loss(np.concatenate([predictions, [pool, pooled]]), observed)
        raised = self.weights * np.exp(-RATE * (losses[:-2] - losses[:-2].min()))
        weights = (1 - SHARE) * raised / raised.sum() + SHARE / len(raised)
        past = losses[None] if self.losses is None else np.concatenate([self.losses[1 - WINDOW :], losses[None]])
        return Track(weights, past, self.pending, forecast)

    def judged_as(self, other: Track) -> Track:
        """This track with the members judged by how they did at the horizon of ``other``."""
        return replace(self, weights=other.weights, losses=other.losses)
