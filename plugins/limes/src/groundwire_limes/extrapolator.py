"""Forecasting class priors from past label counts. NumPy only, so it also runs where a model is served."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from groundwire_limes.forecaster_state import ForecasterStates
from groundwire_limes.forecasters import FORECASTERS, experts
from groundwire_limes.functional import Array, laplace_smoothed, published_forecast
from groundwire_limes.history import History, horizon, usual_gap
from groundwire_limes.mixture import mixture_horizon
from groundwire_limes.validation import as_class_counts, as_time_step, is_number

Method = Literal["auto", "nearest", "persistence", "seasonal", "kalman", "long_run"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class Forecast:
    """A forecast and how it came about.

    Attributes:
        step: What it is for.
        prior: Shape (K,), float64, positive, sums to 1.
        ahead: How many observed steps after the last one.
        weights: Of the experts of "auto", by name; empty for the other methods.
        trust: 1 if the guard lets the mixture through, 0 if it holds the long-run prior; 1 for the other methods.
    """

    step: int
    prior: Array
    ahead: int
    weights: Mapping[str, float]
    trust: float = 1.0

    @property
    def guarded(self) -> bool:
        """Tell whether the forecast is held near the long-run prior, because the order of the past is no guide."""
        return self.trust < 0.5 or self.weights.get("long_run", 0.0) > 0.5


class PriorExtrapolator:
    """Forecasts the class prior of a time step from the label counts of earlier ones.

    ``"auto"`` mixes the other methods, its experts, by their past log-loss, separately for every horizon, and holds on
    to the long-run prior while they do not beat it. ``"nearest"`` is the published rule: rows ``(1 + counts)``
    normalised, forecast by the successor of the past row nearest to the last one in L1; uniform until two steps are
    observed. It knows neither clamp nor guard nor largest move. The others are experts alone.

    Whatever the order in which counts arrive, the forecast is a function of the counts by step: labels that come late
    revise history. A forecast for a step uses earlier steps only. A step that was never updated is missing: rules
    count observed steps. If labels are D steps late, ask for the step D ahead; the experts are then judged D ahead.

    Args:
        num_classes: K, at least 2.
        method: ``"auto"``, ``"nearest"``, ``"persistence"`` (last step), ``"seasonal"`` (same slot of earlier
            seasons), ``"kalman"`` (level and harmonics), or ``"long_run"`` (all labels).
        period: Steps in a season, for example 24 for hours of a day; None if there is none, then the seasonal expert
            sits out.
        smoothing: Count added to each class of a step. By default 1 for ``"nearest"`` and shrinkage towards the
            long-run prior for the others.
        max_move: Largest move of a forecast per step, in log-odds (nats), for ``"auto"`` only; infinity for no limit.
            By default 3, or what is usual in the stream if that is more.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> extrapolator = PriorExtrapolator(2, method="nearest")
        >>> for step, counts in enumerate([[8, 0], [0, 8], [8, 0]]):
        ...     extrapolator.update(step, counts)
        >>> extrapolator.forecast(3).tolist()
        [0.1, 0.9]
    """

    def __init__(
        self,
        num_classes: int,
        *,
        method: Method = "auto",
        period: int | None = None,
        smoothing: float | None = None,
        max_move: float | None = None,
    ) -> None:
        _check_arguments(num_classes, method, period, smoothing, max_move)
        self.num_classes = int(num_classes)
        self.method: Method = method
        self.period = None if period is None else int(period)
        self.smoothing = smoothing
        self.max_move = max_move
        self._start_from(History(self.num_classes))

    def _start_from(self, history: History) -> None:
        self._history = history
        self._states = ForecasterStates(history, self.period, self.smoothing, self.max_move, self.method == "auto")

    # What is observed

    def update(self, step: int, counts: Any) -> None:
        """Add label counts to a step. A second update of a step adds; a step may be older than others.

        Args:
            step: Any whole number; the next step is ``step + 1``.
            counts: Shape (K,), finite, at least 0; fractions are allowed (weighted or soft labels).

        Raises:
            TypeError: ``step`` is not a whole number.
            ValueError: ``counts`` does not fit; the class is named.
        """
        step, row = as_time_step(step), as_class_counts(counts, self.num_classes)
        if self.method != "nearest" and not row.any():
            return  # No label says nothing; the published rule makes a uniform row of it.
        self._states.forget_after(self._history.add(step, row))

    @property
    def observed(self) -> int:
        """Number of steps that have counts."""
        return len(self._history)

    @property
    def last_step(self) -> int | None:
        """The newest step that has counts."""
        return self._history.steps[-1] if self._history.steps else None

    # What is forecast

    def forecast(self, step: int, *, known: int | None = None) -> Array:
        """Return the class prior expected at ``step``, from earlier steps.

        Args:
            step: Any whole number.
            known: Use steps up to this one only, as if later labels had not come yet.

        Returns:
            Shape (K,), float64, positive, sums to 1; uniform if no earlier step is known.

        Raises:
            TypeError: ``step`` is not a whole number.
        """
        return self.explain(step, known=known).prior

    def explain(self, step: int, *, known: int | None = None) -> Forecast:
        """Return :meth:`forecast` with the experts' weights and what the guard did.

        Example:
            >>> PriorExtrapolator(2).explain(0).prior.tolist()
            [0.5, 0.5]
        """
        step = as_time_step(step)
        rows = self._history.before(step if known is None else min(step, as_time_step(known) + 1))
        steps = self._history.steps[:rows]
        ahead = horizon(steps[-1], step, usual_gap(steps)) if steps else 1
        if self.method == "nearest":
            alpha = 1.0 if self.smoothing is None else self.smoothing
            smoothed = laplace_smoothed(self._history.counts[:rows], alpha)
            return Forecast(step, published_forecast(smoothed, ahead), ahead, {})
        if rows == 0:
            return Forecast(step, np.full(self.num_classes, 1 / self.num_classes), ahead, {})
        if self.method == "auto":
            return self._mixed(step, rows, ahead)
        past = self._states.past(self._states.state(rows))
        return Forecast(step, np.array(FORECASTERS[self.method](past, step)), ahead, {})

    def _mixed(self, step: int, rows: int, ahead: int) -> Forecast:
        states, at = self._states, mixture_horizon(ahead, self.period)
        states.keep_horizon(at)
        state = states.state(rows)
        mixture = state.mixtures[at]
        prior = states.forecast(state, states.expert_forecasts(state, step, at), at)
        weights = dict(zip(experts(self.period), mixture.weights.tolist(), strict=True))
        return Forecast(step, np.array(prior), ahead, weights, mixture.trust)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return everything in plain types: arguments and counts. Forecasts after loading are bit-identical."""
        return {
            "num_classes": self.num_classes,
            "method": self.method,
            "period": self.period,
            "smoothing": self.smoothing,
            "max_move": self.max_move,
            "steps": list(self._history.steps),
            "counts": self._history.counts.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: The state is of an extrapolator with other arguments; the differences are listed.
        """
        names = ("num_classes", "method", "period", "smoothing", "max_move")
        missing = [name for name in (*names, "steps", "counts") if name not in state]
        if missing:
            raise ValueError(f"this is no state of a PriorExtrapolator: it lacks {', '.join(missing)}")
        other = [
            f"{n} is {state[n]!r} there and {getattr(self, n)!r} here" for n in names if state[n] != getattr(self, n)
        ]
        if other:
            raise ValueError(f"the saved state does not fit: {'; '.join(other)} -> make one with the saved arguments")
        history = History(self.num_classes)
        for step, counts in zip(state["steps"], state["counts"], strict=True):
            history.add(as_time_step(step), as_class_counts(counts, self.num_classes))
        self._start_from(history)


def _check_arguments(classes: Any, method: Any, period: Any, smoothing: Any, max_move: Any) -> None:
    if isinstance(classes, bool) or not isinstance(classes, int | np.integer) or classes < 2:
        raise ValueError(f"num_classes must be a whole number of at least 2, got {classes!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if period is not None and (isinstance(period, bool) or not isinstance(period, int | np.integer) or period < 2):
        raise ValueError(f"period must be a whole number of at least 2 steps, or None, got {period!r}")
    if method == "seasonal" and period is None:
        raise ValueError("method='seasonal' needs period=, the number of steps in a season")
    if smoothing is not None and not (is_number(smoothing) and 0 < smoothing < math.inf):
        raise ValueError(f"smoothing must be a positive number or None, got {smoothing!r}")
    if max_move is not None and not (is_number(max_move) and max_move > 0):
        raise ValueError(f"max_move must be a positive number of nats or None, got {max_move!r}")
    if max_move is not None and method != "auto":
        raise ValueError(f"max_move acts in method='auto' only, and method is {method!r}")
