"""Time steps of timestamps: the hour, day or run of batches that each row of a batch belongs to. All times are UTC."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire import Fields, PluginError
from groundwire_limes.batch_fields import find_in_batch, number_of_rows
from groundwire_limes.validation import check_whole_number

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
#: The season that is looked for unasked.
DAY = "1d"
#: Unix seconds of the year 5138: whatever is larger was meant as milliseconds.
MILLISECONDS = 1e11
INEXACT = (
    "cannot hold Unix seconds to the second -> keep timestamps as int64 (mixed and half precision cast floating ones)"
)


def period_seconds(period: Any) -> float:
    """Return the length of ``period``: a number of seconds, a ``timedelta``, or text such as ``"1h"``, ``"15min"``.

    Raises:
        ValueError: It is neither, or not positive.

    Example:
        >>> period_seconds("15min"), period_seconds(timedelta(days=1)), period_seconds(60)
        (900.0, 86400.0, 60.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", period) if isinstance(period, str) else None
    if match is not None and match[2] in UNITS:
        length = float(match[1]) * UNITS[match[2]]
    elif isinstance(period, timedelta):
        length = period.total_seconds()
    else:
        number = isinstance(period, int | float) and not isinstance(period, bool)
        length = float(period) if number else math.nan
    if not 0 < length < math.inf:
        raise ValueError(
            f"period must be a positive length such as '1h', '15min', '1d', a timedelta or a number of seconds, "
            f"got {period!r}"
        )
    return length


def season_steps(season: Any, period: float) -> int | None:
    """Return how many steps a season has; None if it is not a whole number of at least two steps.

    Example:
        >>> season_steps("1d", 3600.0), season_steps("1d", 86400.0), season_steps(None, 1.0)
        (24, None, None)
    """
    if season is None:
        return None
    count = period_seconds(season) / period
    return round(count) if count >= 2 and abs(count - round(count)) < 1e-9 else None


def unix_seconds(times: Any) -> NDArray[np.float64]:
    """Return Unix seconds of ``times``: numbers, or datetimes that know their time zone; one or many.

    Raises:
        ValueError: A datetime without a time zone, NaN, milliseconds, or float32, which cannot hold seconds.

    Example:
        >>> unix_seconds([datetime(1970, 1, 2, tzinfo=UTC)]).tolist()
        [86400.0]
    """
    if isinstance(times, datetime):
        times = [times]
    if isinstance(times, Sequence) and len(times) and all(isinstance(t, datetime) for t in times):
        naive = next((t for t in times if t.utcoffset() is None), None)
        if naive is not None:
            raise ValueError(
                f"the datetime {naive!r} has no time zone, so it is not known when it was -> "
                "time.replace(tzinfo=datetime.UTC), or Unix seconds"
            )
        values = np.array([t.timestamp() for t in times])
    else:
        values = _as_float64(times)
    if not np.isfinite(values).all():
        raise ValueError(f"a timestamp is {values[~np.isfinite(values)][0]}; every row needs one")
    return values.reshape(-1)


def _as_float64(times: Any) -> NDArray[np.float64]:
    if str(getattr(times, "dtype", "")) == "torch.bfloat16":
        raise ValueError(f"bfloat16 {INEXACT}")
    array = np.asarray(times.detach().cpu() if hasattr(times, "detach") else times)
    if array.dtype.kind == "M":
        raise ValueError(
            "datetime64 values have no time zone -> Unix seconds: values.astype('datetime64[s]').astype(int)"
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(f"timestamps must be numbers (Unix seconds) or datetimes with a time zone, got {array.dtype}")
    values = array.astype(np.float64)
    if array.dtype in (np.float32, np.float16) and values.size and np.abs(values).max() >= 2**24:
        raise ValueError(f"{array.dtype} {INEXACT}")
    return values


def time_steps(times: Any, period: float) -> NDArray[np.int64]:
    """Return which period since 1970 each time falls in: ``floor(t / period)``; int64.

    Raises:
        ValueError: As for :func:`unix_seconds`, or the times look like milliseconds.

    Example:
        >>> time_steps([0, 3599, 3600, -1], 3600.0).tolist()
        [0, 0, 1, -1]
    """
    values = unix_seconds(times)
    if values.size and max(values.max(), -values.min()) > MILLISECONDS:
        raise ValueError(
            f"the timestamp {values.max():.0f} looks like milliseconds -> divide by 1000, in integers or float64"
        )
    return np.floor(values / period).astype(np.int64)


def shared_time_step(times: Any, period: float) -> int | None:
    """Return the period that all of ``times`` fall in, where a look at the oldest and the newest tells; else None.

    Most batches lie in one step, and this spares them most of :func:`time_steps`.

    Args:
        times: Answered are tensors in host memory that hold seconds exactly: int64 or float64.
        period: Its length in seconds.
    """
    if str(getattr(times, "dtype", "")) not in ("torch.int64", "torch.float64") or times.is_cuda or not times.numel():
        return None
    oldest, newest = (float(t) for t in times.aminmax())
    if not -MILLISECONDS <= oldest <= newest <= MILLISECONDS:
        return None  # NaN, too
    first, last = math.floor(oldest / period), math.floor(newest / period)
    return first if first == last else None


def start_of_step(step: int, period: float) -> datetime:
    """Return when ``step`` begins.

    Example:
        >>> start_of_step(1, 3600.0).isoformat()
        '1970-01-01T01:00:00+00:00'
    """
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=step * period)


@dataclass(frozen=True)
class BatchSteps:
    """Time steps of the rows of a batch.

    Attributes:
        keys: Shape (B,), int64; or the step of all rows, if they belong to one, as in most batches.
        rows: B.

    Example:
        >>> mixed = BatchSteps(np.array([3, 4, 3]), 3)
        >>> mixed.distinct, mixed.earliest, mixed.mask(4).tolist()
        ([3, 4], 3, [False, True, False])
        >>> mixed.mask(4, predictions=6).tolist()
        [False, False, True, True, False, False]
    """

    keys: int | NDArray[np.int64]
    rows: int

    @property
    def earliest(self) -> int:
        """The oldest step of all rows."""
        return self.keys if isinstance(self.keys, int) else int(self.keys.min())

    @property
    def distinct(self) -> list[int]:
        """All steps, ascending."""
        return [self.keys] if isinstance(self.keys, int) else np.unique(self.keys).tolist()

    def mask(self, step: int, predictions: int | None = None) -> NDArray[np.bool_]:
        """Return which rows belong to ``step``, shape (B,); or which of ``predictions``, where rows have several."""
        rows = np.broadcast_to(self.keys == step, (self.rows,))
        return rows if predictions is None else np.repeat(rows, predictions // self.rows)


@dataclass(frozen=True)
class TimeIndex:
    """Finds the time steps of batches, from timestamps or by counting training batches.

    Attributes:
        time: Where a batch has its timestamps: a key, or ``time(batch)``.
        seconds: Length of a step.
        batches_per_step: A step is so many training batches; None if timestamps tell.
    """

    time: str | Callable[[Any], Any]
    seconds: float
    batches_per_step: int | None = None

    def of_training_batch(self, batch: Any, fields: Fields, batches: int) -> BatchSteps:
        """Return the steps of the rows of a training batch.

        Args:
            batch: As the loader gave it.
            fields: Its inputs, targets and time.
            batches: Training batches before this one.

        Raises:
            PluginError: There are no timestamps, or they do not fit.
        """
        rows = number_of_rows(fields)
        if self.batches_per_step is not None:
            return BatchSteps(batches // self.batches_per_step, rows)
        times = find_in_batch(self.time, batch, fields)
        if times is None:
            raise PluginError(
                f"limes: no {self.time!r} in a training batch -> LIMES(time='its key') or LIMES(time=lambda batch: "
                "...), or count batches: LIMES(batches_per_step=...)"
            )
        return self.of_times(times, rows)

    def of_evaluation_batch(self, batch: Any, fields: Fields, otherwise: int) -> BatchSteps:
        """Return the steps of a batch that is only predicted; ``otherwise`` for a batch without time."""
        rows = number_of_rows(fields)
        times = find_in_batch(self.time, batch, fields) if self.batches_per_step is None else None
        return BatchSteps(otherwise, rows) if times is None else self.of_times(times, rows)

    def of_times(self, times: Any, rows: int) -> BatchSteps:
        """Return the steps of ``times``, of which there is one for each of ``rows``, or one for all.

        Raises:
            PluginError: A time is wrong, there is none, or there are as many as neither one nor the rows.
        """
        if (shared := shared_time_step(times, self.seconds)) is not None and times.numel() in (1, rows):
            return BatchSteps(shared, rows)
        keys = self._time_steps(times)
        if not keys.size:
            raise PluginError("limes: a batch has no rows -> leave it out of the stream")
        if keys.size not in (1, rows):
            raise PluginError(
                f"limes: {keys.size} timestamps for a batch of {rows} rows -> one for each, or one for all"
            )
        return BatchSteps(int(keys[0]) if keys.min() == keys.max() else keys, rows)

    def distinct(self, times: Sequence[Any]) -> tuple[list[int], float | None]:
        """Return the steps in which ``times`` fall, ascending, and the length of a step in seconds.

        Where batches are counted, ``times`` are step numbers, and there is no length.

        Raises:
            PluginError: A time is wrong.
        """
        if self.batches_per_step is not None:
            return np.unique(np.asarray(times, np.int64)).tolist(), None
        return np.unique(self._time_steps(times)).tolist(), self.seconds

    def season(self, season: str | int | None) -> int | None:
        """Return the steps in ``season``; None if there is none, or if a day, looked for unasked, has no whole steps.

        Raises:
            ValueError: It is not two whole steps or more.
        """
        if self.batches_per_step is not None and season not in (None, DAY):
            check_whole_number("season", season, 2)
            return int(season)
        count = season_steps(season, self.seconds) if self.batches_per_step is None else None
        if count is None and season not in (None, DAY):
            raise ValueError(f"season must be two steps or more, whole ones of {self.seconds:g} s each, got {season!r}")
        return count

    def _time_steps(self, times: Any) -> NDArray[np.int64]:
        try:
            return time_steps(times, self.seconds)
        except ValueError as error:
            raise PluginError(f"limes: {error}") from error
