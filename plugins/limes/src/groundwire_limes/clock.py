"""Which time step the rows of a batch belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundwire import Fields, PluginError
from groundwire_limes.arguments import whole
from groundwire_limes.inspection import rows_of
from groundwire_limes.steps import shared_key, step_keys, steps_in
from groundwire_limes.times import times_of

#: The season that is looked for unasked.
DAY = "1d"


@dataclass(frozen=True)
class Steps:
    """Steps of the rows of a batch.

    Attributes:
        keys: Shape (B,), int64; or the step of all rows, if they belong to one, as in most batches.
        rows: B.

    Example:
        >>> mixed = Steps(np.array([3, 4, 3]), 3)
        >>> mixed.distinct, mixed.earliest, mixed.belonging_to(4).tolist()
        ([3, 4], 3, [False, True, False])
    """

    keys: int | np.ndarray[Any, Any]
    rows: int

    @property
    def earliest(self) -> int:
        """The oldest step of all rows."""
        return self.keys if isinstance(self.keys, int) else int(self.keys.min())

    @property
    def distinct(self) -> list[int]:
        """All steps, ascending."""
        return [self.keys] if isinstance(self.keys, int) else np.unique(self.keys).tolist()

    def belonging_to(self, step: int) -> np.ndarray[Any, Any]:
        """Which rows belong to ``step``, shape (B,), bool."""
        return np.broadcast_to(self.keys == step, (self.rows,))


@dataclass(frozen=True)
class Clock:
    """Tells the step, from timestamps or by counting batches.

    Attributes:
        time: Where a batch has its timestamps: a key, or ``time(batch)``.
        seconds: Length of a step.
        batches_per_step: A step is so many training batches; None if timestamps tell.
    """

    time: str | Callable[[Any], Any]
    seconds: float
    batches_per_step: int | None = None

    def training(self, batch: Any, fields: Fields, batches: int) -> Steps:
        """Steps of the rows of a training batch.

        Args:
            batch: As the loader gave it.
            fields: Its inputs, targets and time.
            batches: Training batches before this one.

        Raises:
            PluginError: There are no timestamps, or they do not fit.
        """
        rows = rows_of(fields)
        if self.batches_per_step is not None:
            return Steps(batches // self.batches_per_step, rows)
        times = times_of(self.time, batch, fields)
        if times is None:
            raise PluginError(
                f"limes: no {self.time!r} in a training batch -> LIMES(time='its key') or LIMES(time=lambda batch: "
                "...), or count batches: LIMES(batches_per_step=...)"
            )
        return self.steps(times, rows)

    def evaluation(self, batch: Any, fields: Fields, otherwise: int) -> Steps:
        """As :meth:`training`, of a batch that is only predicted; ``otherwise`` for a batch without time."""
        rows = rows_of(fields)
        times = times_of(self.time, batch, fields) if self.batches_per_step is None else None
        return Steps(otherwise, rows) if times is None else self.steps(times, rows)

    def steps(self, times: Any, rows: int) -> Steps:
        """Steps of ``times``, of which there is one for each row or one for all.

        Raises:
            PluginError: A time is wrong, there is none, or there are as many as neither one nor the rows.
        """
        if (shared := shared_key(times, self.seconds)) is not None and times.numel() in (1, rows):
            return Steps(shared, rows)
        keys = self._keys(times)
        if not keys.size:
            raise PluginError("limes: a batch has no rows -> leave it out of the stream")
        if keys.size not in (1, rows):
            raise PluginError(
                f"limes: {keys.size} timestamps for a batch of {rows} rows -> one for each, or one for all"
            )
        return Steps(int(keys[0]) if keys.min() == keys.max() else keys, rows)

    def distinct(self, times: Sequence[Any]) -> tuple[list[int], float | None]:
        """Steps in which ``times`` fall, ascending, and how long a step is; step numbers if batches are counted.

        Raises:
            PluginError: A time is wrong.
        """
        if self.batches_per_step is not None:
            return np.unique(np.asarray(times, np.int64)).tolist(), None
        return np.unique(self._keys(times)).tolist(), self.seconds

    def season(self, season: str | int | None) -> int | None:
        """Steps in ``season``; None if there is none, or if a day, which is looked for unasked, has no whole steps.

        Raises:
            ValueError: It is not two whole steps or more.
        """
        if self.batches_per_step is not None and season not in (None, DAY):
            whole("season", season, 2)
            return int(season)
        count = steps_in(season, self.seconds) if self.batches_per_step is None else None
        if count is None and season not in (None, DAY):
            raise ValueError(f"season must be two steps or more, whole ones of {self.seconds:g} s each, got {season!r}")
        return count

    def _keys(self, times: Any) -> np.ndarray[Any, Any]:
        try:
            return step_keys(times, self.seconds)
        except ValueError as error:
            raise PluginError(f"limes: {error}") from error
