"""What follows from the rows one after the other, with states kept to return to when late labels revise a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import quantiles

import numpy as np

from groundwire_limes import kalman
from groundwire_limes.functional import Array, divergence, log_odds, shrunk, smoothed
from groundwire_limes.hedge import WINDOW, Track, is_change, whole_seasons_on
from groundwire_limes.history import History, usual_gap
from groundwire_limes.members import Past, members

#: Largest move per step in log-odds that "auto" makes unless told otherwise, in nats; more only where moves that are
#: larger than all but a tenth of the recent ones are usual, so that one flooded step does not open the door for itself.
MAX_MOVE, MARGIN, USUAL, RECENT = 3.0, 1.25, 10, 48
#: How many labels of the running mean a row is shrunk by, per class.
SHRINKAGE = 0.2
#: States kept to return to when late labels revise a recent row; fewer where their covariances hold more numbers.
KEPT, NUMBERS = 64, 2**24


@dataclass(frozen=True)
class State:
    """What is known after some rows, besides the rows.

    Attributes:
        rows: How many.
        gap: How far apart their steps usually are.
        total: Their label counts together, shape (K,).
        pooled: Those smoothed and normalised: the long-run prior.
        filter: The Kalman filter; None before the first row.
        tracks: How the members of "auto" did, by horizon.
        moves: Largest moves in log-odds between the last rows, in nats.
        limit: Largest move of a forecast per step, in nats of log-odds.
        surprises: Divergences of the forecasts of the last rows from them, in nats.
        changed: Index of the last row that no member saw coming; at first 0, the start of the stream.
    """

    rows: int
    gap: int
    total: Array
    pooled: Array
    filter: kalman.Filter | None
    tracks: Mapping[int, Track]
    moves: tuple[float, ...] = ()
    limit: float = MAX_MOVE
    surprises: tuple[float, ...] = ()
    changed: int = 0


class Recursion:
    """States of a history, computed once for each row.

    Args:
        history: The rows; whoever adds to it tells :meth:`forget_after`.
        period: Steps of a season, or None.
        smoothing: Count added to each class of a row; None for shrinkage towards the long-run prior.
        max_move: Largest move of a forecast per step, in nats; None for what is usual.
        judged: Whether to keep the scores of the members, which "auto" needs.
    """

    def __init__(
        self, history: History, period: int | None, smoothing: float | None, max_move: float | None, judged: bool
    ) -> None:
        self._history = history
        self._classes = history.counts.shape[1]
        self._period, self._smoothing, self._max_move = period, smoothing, max_move
        self._priors = np.zeros((64, self._classes))
        self._kept = max(4, min(KEPT, NUMBERS // (self._classes * (1 + 2 * kalman.harmonics(period)) ** 2)))
        self._states: dict[int, State] = {}
        self._distances: dict[int, Array] = {}
        self._horizons: tuple[int, ...] = (1,) if judged else ()
        self._made: tuple[Track, Array, Array] | None = None

    def forget_after(self, row: int) -> None:
        """The row with this index changed: what was computed from it is void."""
        self._states = {n: state for n, state in self._states.items() if n <= row}
        self._distances = {n: found for n, found in self._distances.items() if n < row}

    def follow(self, horizon: int) -> None:
        """Judge the members so many observed steps ahead, too."""
        if horizon not in self._horizons:
            self._horizons = (*self._horizons, horizon)
            self._states = {}

    def expected(self, state: State, step: int, horizon: int) -> Array:
        """What each member expects of ``step`` after ``state``, shape (M, K); mostly it was asked for before."""
        past = self.past(state)
        if step == past.steps[-1] + horizon * state.gap:
            return state.tracks[horizon].pending[step]
        return self.predictions(past, step)

    def forecast(self, state: State, predictions: Array, horizon: int) -> Array:
        """What "auto" makes of ``predictions`` (M, K); kept, because it is judged when its step is over."""
        track = state.tracks[horizon]
        if self._made is None or self._made[0] is not track or self._made[1] is not predictions:
            self._made = track, predictions, track.forecast(predictions, state.pooled, state.limit)
        return self._made[2]

    def predictions(self, past: Past, step: int) -> Array:
        """What each member expects of ``step``, shape (M, K)."""
        return np.stack([member(past, step) for member in members(self._period).values()])

    def past(self, state: State) -> Past:
        """What the members see."""
        assert state.filter is not None
        n, known = state.rows, self._history.steps
        return Past(known[:n], state.gap, self._priors[:n], state.pooled, state.filter, self._period, self.distances)

    def distances(self, row: int) -> Array:
        """L1 distances of a row from all rows before it. Each new row is compared once, whoever asks."""
        if row not in self._distances:
            if len(self._distances) == KEPT:
                del self._distances[next(iter(self._distances))]
            self._distances[row] = np.abs(self._priors[:row] - self._priors[row]).sum(axis=1)
        return self._distances[row]

    def state(self, rows: int) -> State:
        """The state after the first ``rows`` rows, from the newest one that is kept."""
        start = max((n for n in self._states if n <= rows), default=0)
        state = self._states[start] if start else self._initial()
        while state.rows < rows:
            state = self._next(state)
            self._states[state.rows] = state
        for old in sorted(self._states)[: -self._kept]:
            del self._states[old]
        return state

    def _initial(self) -> State:
        uniform = np.full(self._classes, 1 / self._classes)
        size = len(members(self._period))
        tracks = {h: Track(np.full(size, 1 / size)) for h in self._horizons}
        return State(0, 1, np.zeros(self._classes), uniform, None, tracks, limit=self._limit(()))

    def _next(self, state: State) -> State:
        n = state.rows
        step, counts = self._history.steps[n], self._history.counts[n]
        state = self._compared(state, step, counts)
        tracks = {h: self._scored(h, state, step, counts) for h in state.tracks}
        row = self._row(counts, state.pooled)
        self._keep(n, row)
        total = state.total + counts
        moves = (*state.moves, self._move(n))[-RECENT:] if n else ()
        after = replace(
            state,
            rows=n + 1,
            gap=usual_gap(self._history.steps[: n + 1]),
            total=total,
            pooled=smoothed(total, 1.0 if self._smoothing is None else self._smoothing),
            filter=self._filtered(state.filter, step, row, float(counts.sum())),
            tracks=self._lent(tracks, n - state.changed),
            moves=moves,
            limit=self._limit(moves),
        )
        return replace(after, tracks=self._with_pending(after, step)) if tracks else after

    def _row(self, counts: Array, pooled: Array) -> Array:
        if self._smoothing is not None:
            return smoothed(counts, self._smoothing)
        return shrunk(counts, pooled, SHRINKAGE * self._classes)

    def _keep(self, n: int, row: Array) -> None:
        if n == len(self._priors):
            self._priors = np.concatenate([self._priors, np.zeros_like(self._priors)])
        self._priors[n] = row

    def _move(self, n: int) -> float:
        return float(np.abs(log_odds(self._priors[n]) - log_odds(self._priors[n - 1])).max())

    def _limit(self, moves: tuple[float, ...]) -> float:
        if self._max_move is not None:
            return self._max_move
        usual = quantiles(moves, n=USUAL, method="inclusive")[-1] if len(moves) >= USUAL else 0.0
        return max(MAX_MOVE, MARGIN * usual)

    def _filtered(self, state: kalman.Filter | None, step: int, row: Array, size: float) -> kalman.Filter:
        if state is None:
            return kalman.start(step, row, size, self._period)
        return kalman.updated(state, step, row, size, self._period)

    def _scored(self, ahead: int, state: State, step: int, counts: Array) -> Track:
        track = state.tracks[ahead]
        pending = {s: p for s, p in track.pending.items() if s > step}
        predictions = track.pending.get(step)
        if predictions is None and ahead == 1 and state.rows:
            predictions = self.predictions(self.past(state), step)  # a step before this one is missing
        if predictions is None:
            return replace(track, pending=pending)
        observed = counts / counts.sum()
        forecast = self.forecast(state, predictions, ahead)
        return replace(track.scored(predictions, state.pooled, observed, forecast), pending=pending)

    def _compared(self, state: State, step: int, counts: Array) -> State:
        """Note how surprising a row is, if that matters to any horizon."""
        if not any(whole_seasons_on(h, self._period) for h in state.tracks):
            return state
        predictions = state.tracks[1].pending.get(step)
        if predictions is None:
            return state
        surprise = divergence(counts / counts.sum(), self.forecast(state, predictions, 1))
        changed = state.rows if is_change(surprise, state.surprises) else state.changed
        return replace(state, surprises=(*state.surprises, surprise)[-WINDOW:], changed=changed)

    def _lent(self, tracks: dict[int, Track], since: int) -> dict[int, Track]:
        """The next step's, where no forecast that could know of the last change, ``since`` rows ago, was judged yet."""
        late = [h for h in tracks if whole_seasons_on(h, self._period) and since < h]
        return tracks | {h: tracks[h].judged_as(tracks[1]) for h in late}

    def _with_pending(self, state: State, step: int) -> dict[int, Track]:
        past = self.past(state)
        tracks = {}
        for ahead, track in state.tracks.items():
            target = step + ahead * state.gap
            tracks[ahead] = replace(track, pending={**track.pending, target: self.predictions(past, target)})
        return tracks
