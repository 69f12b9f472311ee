"""State of a forecaster after each observed time step, updated row by row. NumPy only.

States are kept for the last rows, to return to when late labels revise one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import quantiles

import numpy as np

from groundwire_limes.forecasters import Past, experts
from groundwire_limes.functional import Array, dirichlet_mean, kl_divergence, laplace_smoothed, log_odds
from groundwire_limes.history import History, usual_gap
from groundwire_limes.kalman import KalmanFilter, harmonics
from groundwire_limes.mixture import WINDOW, Mixture, is_change_point, is_whole_seasons_later

#: Largest move per step in log-odds that "auto" makes unless told otherwise, in nats; more only where moves that are
#: larger than all but a tenth of the recent ones are usual, so that one flooded step does not open the door for itself.
MAX_MOVE, MARGIN, USUAL, RECENT = 3.0, 1.25, 10, 48
#: How many labels of the long-run prior a row is shrunk by, per class.
SHRINKAGE = 0.2
#: States kept to return to when late labels revise a recent row; fewer where their covariances hold more numbers.
KEPT, NUMBERS = 64, 2**24


@dataclass(frozen=True)
class ForecasterState:
    """Everything that follows from the first rows.

    Attributes:
        rows: How many.
        gap: How far apart their steps usually are.
        total: Their label counts together, shape (K,).
        long_run: Those smoothed and normalised: the long-run prior.
        filter: The Kalman filter; None before the first row.
        mixtures: The mixtures of "auto", by horizon.
        moves: Largest moves in log-odds between the last rows, in nats.
        limit: Largest move of a forecast per step, in nats of log-odds.
        divergences: Of the forecasts of the last rows from them, in nats.
        changed: Index of the last row that no expert saw coming; at first 0, the start of the stream.
    """

    rows: int
    gap: int
    total: Array
    long_run: Array
    filter: KalmanFilter | None
    mixtures: Mapping[int, Mixture]
    moves: tuple[float, ...] = ()
    limit: float = MAX_MOVE
    divergences: tuple[float, ...] = ()
    changed: int = 0


class ForecasterStates:
    """States after the rows of a history, each computed once.

    Args:
        history: The rows; whoever adds to it calls :meth:`forget_after`.
        period: Steps of a season, or None.
        smoothing: Count added to each class of a row; None for shrinkage towards the long-run prior.
        max_move: Largest move of a forecast per step, in nats; None for what is usual.
        mixed: Whether to keep mixtures of experts, which "auto" needs.
    """

    def __init__(
        self, history: History, period: int | None, smoothing: float | None, max_move: float | None, mixed: bool
    ) -> None:
        self._history = history
        self._classes = history.counts.shape[1]
        self._period, self._smoothing, self._max_move = period, smoothing, max_move
        self._priors = np.zeros((64, self._classes))
        self._kept = max(4, min(KEPT, NUMBERS // (self._classes * (1 + 2 * harmonics(period)) ** 2)))
        self._by_rows: dict[int, ForecasterState] = {}
        self._distances: dict[int, Array] = {}
        self._horizons: tuple[int, ...] = (1,) if mixed else ()
        self._last_forecast: tuple[Mixture, Array, Array] | None = None

    def forget_after(self, row: int) -> None:
        """Drop what was computed from the row with this index, which changed, and from later ones."""
        self._by_rows = {n: state for n, state in self._by_rows.items() if n <= row}
        self._distances = {n: found for n, found in self._distances.items() if n < row}

    def keep_horizon(self, horizon: int) -> None:
        """Keep a mixture for forecasts so many observed steps ahead, too."""
        if horizon not in self._horizons:
            self._horizons = (*self._horizons, horizon)
            self._by_rows = {}

    # What follows from a state

    def expert_forecasts(self, state: ForecasterState, step: int, horizon: int) -> Array:
        """Return what each expert expects of ``step`` after ``state``, shape (M, K); mostly it was asked for before."""
        past = self.past(state)
        if step == past.steps[-1] + horizon * state.gap:
            return state.mixtures[horizon].pending[step]
        return self._predictions(past, step)

    def forecast(self, state: ForecasterState, predictions: Array, horizon: int) -> Array:
        """Return what "auto" makes of ``predictions`` (M, K); kept, because it is judged when its step is over."""
        mixture, last = state.mixtures[horizon], self._last_forecast
        if last is None or last[0] is not mixture or last[1] is not predictions:
            last = mixture, predictions, mixture.forecast(predictions, state.long_run, state.limit)
            self._last_forecast = last
        return last[2]

    def past(self, state: ForecasterState) -> Past:
        """Return what the forecasters see."""
        assert state.filter is not None
        n, steps = state.rows, self._history.steps[: state.rows]
        return Past(steps, state.gap, self._priors[:n], state.long_run, state.filter, self._period, self._distances_of)

    def _predictions(self, past: Past, step: int) -> Array:
        return np.stack([expert(past, step) for expert in experts(self._period).values()])

    def _distances_of(self, row: int) -> Array:
        """Return L1 distances of a row from all rows before it. Each new row is compared once, whoever asks."""
        if row not in self._distances:
            if len(self._distances) == KEPT:
                del self._distances[next(iter(self._distances))]
            self._distances[row] = np.abs(self._priors[:row] - self._priors[row]).sum(axis=1)
        return self._distances[row]

    # From one row to the next

    def state(self, rows: int) -> ForecasterState:
        """Return the state after the first ``rows`` rows, computed from the newest one that is kept."""
        start = max((n for n in self._by_rows if n <= rows), default=0)
        state = self._by_rows[start] if start else self._initial()
        while state.rows < rows:
            state = self._next(state)
            self._by_rows[state.rows] = state
        for old in sorted(self._by_rows)[: -self._kept]:
            del self._by_rows[old]
        return state

    def _initial(self) -> ForecasterState:
        uniform = np.full(self._classes, 1 / self._classes)
        size = len(experts(self._period))
        mixtures = {h: Mixture(np.full(size, 1 / size)) for h in self._horizons}
        return ForecasterState(0, 1, np.zeros(self._classes), uniform, None, mixtures, limit=self._largest_move(()))

    def _next(self, state: ForecasterState) -> ForecasterState:
        n = state.rows
        step, counts = self._history.steps[n], self._history.counts[n]
        state = self._with_divergence(state, step, counts)
        mixtures = {horizon: self._updated(horizon, state, step, counts) for horizon in state.mixtures}
        row = self._smoothed_row(counts, state.long_run)
        if n == len(self._priors):
            self._priors = np.concatenate([self._priors, np.zeros_like(self._priors)])
        self._priors[n] = row
        if state.filter is None:
            filtered = KalmanFilter.start(step, row, float(counts.sum()), self._period)
        else:
            filtered = state.filter.updated(step, row, float(counts.sum()))
        moves = (
            (*state.moves, float(np.abs(log_odds(row) - log_odds(self._priors[n - 1])).max()))[-RECENT:] if n else ()
        )
        total = state.total + counts
        after = replace(
            state,
            rows=n + 1,
            gap=usual_gap(self._history.steps[: n + 1]),
            total=total,
            long_run=laplace_smoothed(total, 1.0 if self._smoothing is None else self._smoothing),
            filter=filtered,
            mixtures=self._after_change(mixtures, n - state.changed),
            moves=moves,
            limit=self._largest_move(moves),
        )
        return replace(after, mixtures=self._with_pending(after, step)) if mixtures else after

    def _smoothed_row(self, counts: Array, long_run: Array) -> Array:
        if self._smoothing is not None:
            return laplace_smoothed(counts, self._smoothing)
        return dirichlet_mean(counts, long_run, SHRINKAGE * self._classes)

    def _largest_move(self, moves: tuple[float, ...]) -> float:
        if self._max_move is not None:
            return self._max_move
        usual = quantiles(moves, n=USUAL, method="inclusive")[-1] if len(moves) >= USUAL else 0.0
        return max(MAX_MOVE, MARGIN * usual)

    def _updated(self, horizon: int, state: ForecasterState, step: int, counts: Array) -> Mixture:
        mixture = state.mixtures[horizon]
        pending = {s: p for s, p in mixture.pending.items() if s > step}
        predictions = mixture.pending.get(step)
        if predictions is None and horizon == 1 and state.rows:
            predictions = self._predictions(self.past(state), step)  # a step before this one is missing
        if predictions is None:
            return replace(mixture, pending=pending)
        observed = counts / counts.sum()
        forecast = self.forecast(state, predictions, horizon)
        return replace(mixture.updated(predictions, state.long_run, observed, forecast), pending=pending)

    def _with_divergence(self, state: ForecasterState, step: int, counts: Array) -> ForecasterState:
        """Note how far a row is from its forecast, and whether the stream changed, if that matters to any horizon."""
        if not any(is_whole_seasons_later(h, self._period) for h in state.mixtures):
            return state
        predictions = state.mixtures[1].pending.get(step)
        if predictions is None:
            return state
        found = kl_divergence(counts / counts.sum(), self.forecast(state, predictions, 1))
        changed = state.rows if is_change_point(found, state.divergences) else state.changed
        return replace(state, divergences=(*state.divergences, found)[-WINDOW:], changed=changed)

    def _after_change(self, mixtures: dict[int, Mixture], since: int) -> dict[int, Mixture]:
        """Use the next step's weights where no forecast that knew of the change, ``since`` rows ago, was judged yet."""
        late = [h for h in mixtures if is_whole_seasons_later(h, self._period) and since < h]
        return mixtures | {h: mixtures[h].weighted_as(mixtures[1]) for h in late}

    def _with_pending(self, state: ForecasterState, step: int) -> dict[int, Mixture]:
        past = self.past(state)
        mixtures = {}
        for horizon, mixture in state.mixtures.items():
            target = step + horizon * state.gap
            mixtures[horizon] = replace(mixture, pending={**mixture.pending, target: self._predictions(past, target)})
        return mixtures
