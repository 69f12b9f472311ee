"""From timestamps to step numbers: which hour, day or run of batches a row belongs to. All times are UTC."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
#: Unix seconds of the year 5138: whatever is larger was meant as milliseconds.
MILLISECONDS = 1e11
HOLD = (
    "cannot hold Unix seconds to the second -> keep timestamps as int64 (mixed and half precision cast floating ones)"
)


def seconds(period: Any) -> float:
    """Length of ``period`` in seconds: a number, a ``timedelta``, or text such as ``"1h"``, ``"15min"``, ``"1d"``.

    Raises:
        ValueError: It is neither, or not positive.

    Example:
        >>> seconds("15min"), seconds(timedelta(days=1)), seconds(60)
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


def unix_seconds(times: Any) -> NDArray[np.float64]:
    """Unix seconds of ``times``: numbers, or datetimes that know their time zone; one or many.

    Raises:
        ValueError: A datetime without a time zone, NaN, milliseconds, or float32, which cannot hold seconds.

    Example:
        >>> unix_seconds([datetime(1970, 1, 2, tzinfo=UTC)]).tolist()
        [86400.0]
    """
    if isinstance(times, datetime):
        times = [times]
    if isinstance(times, Sequence) and len(times) and all(isinstance(t, datetime) for t in times):
        values = np.array([_aware(t) for t in times])
    else:
        values = _numbers(times)
    if not np.isfinite(values).all():
        raise ValueError(f"a timestamp is {values[~np.isfinite(values)][0]}; every row needs one")
    return values.reshape(-1)


def _aware(time: datetime) -> float:
    if time.utcoffset() is None:
        raise ValueError(
            f"the datetime {time!r} has no time zone, so it is not known when it was -> "
            "time.replace(tzinfo=datetime.UTC), or Unix seconds"
        )
    return time.timestamp()


def _numbers(times: Any) -> NDArray[np.float64]:
    if str(getattr(times, "dtype", "")) == "torch.bfloat16":
        raise ValueError(f"bfloat16 {HOLD}")
    array = np.asarray(times.detach().cpu() if hasattr(times, "detach") else times)
    if array.dtype.kind == "M":
        raise ValueError(
            "datetime64 values have no time zone -> Unix seconds: values.astype('datetime64[s]').astype(int)"
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(f"timestamps must be numbers (Unix seconds) or datetimes with a time zone, got {array.dtype}")
    values = array.astype(np.float64)
    if array.dtype in (np.float32, np.float16) and values.size and np.abs(values).max() >= 2**24:
        raise ValueError(f"{array.dtype} {HOLD}")
    return values


def step_keys(times: Any, period: float) -> NDArray[np.int64]:
    """Which period since 1970 each time falls in: ``floor(t / period)``; int64.

    Raises:
        ValueError: As for :func:`unix_seconds`, or the times look like milliseconds.

    Example:
        >>> step_keys([0, 3599, 3600, -1], 3600.0).tolist()
        [0, 0, 1, -1]
    """
    values = unix_seconds(times)
    if values.size and max(values.max(), -values.min()) > MILLISECONDS:
        raise ValueError(
            f"the timestamp {values.max():.0f} looks like milliseconds -> divide by 1000, in integers or float64"
        )
    return np.floor(values / period).astype(np.int64)


def shared_key(times: Any, period: float) -> int | None:
    """The period that all of ``times`` fall in, where a look at the oldest and the newest tells; else None.

    Most batches lie in one step, and this spares them most of :func:`step_keys`.

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


def steps_in(season: Any, period: float) -> int | None:
    """How many steps a season has; None if it is not a whole number of at least two steps.

    Example:
        >>> steps_in("1d", 3600.0), steps_in("1d", 86400.0), steps_in(None, 1.0)
        (24, None, None)
    """
    if season is None:
        return None
    count = seconds(season) / period
    return round(count) if count >= 2 and abs(count - round(count)) < 1e-9 else None


def start_of(step: int, period: float) -> datetime:
    """When ``step`` begins.

    Example:
        >>> start_of(1, 3600.0).isoformat()
        '1970-01-01T01:00:00+00:00'
    """
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=step * period)
