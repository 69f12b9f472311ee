"""One ``fit`` over a stream: rows in the order of time, in batches that never span two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import default_collate

from groundwire_limes.functional import Array
from groundwire_limes.steps import seconds, step_keys, unix_seconds


class StreamLoader:
    """Batches of a data set in the order of time, one pass; continued at the next batch after a resume.

    Lightning saves and restores it by its ``state_dict``.

    Args:
        dataset: Map-style data set of rows ``(x, y)``.
        batches: Row indices of each batch.
        times: Unix seconds of the rows, float64.
        collate_fn: Makes a batch of a list of rows.
    """

    def __init__(
        self, dataset: Any, batches: list[np.ndarray[Any, Any]], times: Array, collate_fn: Callable[[list[Any]], Any]
    ) -> None:
        self.dataset, self.batches, self.times, self.collate_fn = dataset, batches, times, collate_fn
        self._next, self._restored = 0, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if not (self._restored and self._next < len(self.batches)):
            self._next = 0
        self._restored = False
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        while self._next < len(self.batches):
            rows = self.batches[self._next]
            self._next += 1
            batch = self.collate_fn([self.dataset[int(i)] for i in rows])
            # int64, because mixed precision casts what floats.
            yield [*batch, {"timestamp": torch.as_tensor(np.floor(self.times[rows]).astype(np.int64))}]

    def state_dict(self) -> dict[str, int]:
        """Which batch comes next."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there at the next ``iter``."""
        self._next, self._restored = state["next"], True


class StreamDataModule(LightningDataModule):
    """A stream for one ``trainer.fit(module, datamodule=...)`` with ``max_epochs=1``.

    Rows are sorted by time (stable), and batches of consecutive rows are made within each step, the last one of a step
    smaller; a batch is ``[x, y, {"timestamp": seconds}]``. One ``fit`` per hour would be another algorithm: every
    ``fit`` makes a new optimizer, whose moments begin again, and ``max_steps`` counts over all of them.

    Args:
        dataset: Map-style data set of rows ``(x, y)``.
        timestamps: Of the rows: Unix seconds, or datetimes with a time zone.
        period: Length of a step, as for :class:`LIMES`.
        batch_size: Rows of a batch.
        collate_fn: Makes ``[x, y]`` of a list of rows.

    Raises:
        ValueError: The timestamps do not fit the data set, or are not in UTC.

    Example:
        >>> rows = [(float(i), i % 2) for i in range(5)]
        >>> stream = StreamDataModule(rows, [0, 0, 0, 3600, 3600], batch_size=2)
        >>> [batch[1].tolist() for batch in stream.train_dataloader()]
        [[0, 1], [0], [1, 0]]
        >>> stream.step_counts(0, num_classes=2).tolist()
        [2.0, 1.0]
    """

    def __init__(
        self,
        dataset: Any,
        timestamps: Any,
        *,
        period: str | float = "1h",
        batch_size: int = 100,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._times = unix_seconds(timestamps)
        if len(self._times) != len(dataset):
            raise ValueError(f"{len(self._times)} timestamps for {len(dataset)} rows -> one for each row")
        self._dataset, self._collate = dataset, collate_fn
        self._keys = step_keys(self._times, seconds(period))
        order = np.argsort(self._times, kind="stable")
        bounds = np.flatnonzero(np.diff(self._keys[order])) + 1
        steps = np.split(order, bounds) if len(order) else []
        self._batches = [rows[i : i + batch_size] for rows in steps for i in range(0, len(rows), batch_size)]

    def train_dataloader(self) -> StreamLoader:
        """All rows once, in the order of time."""
        return StreamLoader(self._dataset, self._batches, self._times, self._collate)

    def step_counts(self, step: int, num_classes: int) -> Array:
        """How often each label occurs in ``step``, for ``training_prior="realised"``; shape (K,)."""
        labels = [int(self._dataset[int(i)][1]) for i in np.flatnonzero(self._keys == step)]
        return np.bincount([k for k in labels if k >= 0], minlength=num_classes).astype(np.float64)
