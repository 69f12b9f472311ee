"""A DataModule for one ``fit`` over a stream: rows in the order of time, in batches that never span two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, default_collate

from groundwire import default_fields
from groundwire_limes.functional import Array
from groundwire_limes.labels import labels_of
from groundwire_limes.time_steps import period_seconds, time_steps, unix_seconds
from groundwire_limes.validation import check_whole_number


class StreamLoader:
    """Batches of a data set in the order of time, one pass; continued at the next batch after a resume.

    Lightning saves and restores it by its ``state_dict``.

    Args:
        dataset: Map-style data set of rows ``(x, y)``, or dicts.
        batches: Row indices of each batch.
        times: Unix seconds of the rows, float64.
        collate_fn: Makes a batch of a list of rows.
        num_workers: Processes that read ahead.
    """

    def __init__(
        self,
        dataset: Any,
        batches: list[np.ndarray[Any, Any]],
        times: Array,
        collate_fn: Callable[[list[Any]], Any],
        num_workers: int = 0,
    ) -> None:
        self.dataset, self.batches, self.times = dataset, batches, times
        self.collate_fn, self.num_workers = collate_fn, num_workers
        self._next, self._restored = 0, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if not (self._restored and self._next < len(self.batches)):
            self._next = 0
        self._restored = False
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        left = self.batches[self._next :]
        loader = DataLoader(
            self.dataset,
            batch_sampler=[rows.tolist() for rows in left],
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            # Workers get their seeds from the user's; without any, nothing is drawn from it.
            generator=None if self.num_workers else torch.Generator(),
        )
        for rows, batch in zip(left, loader, strict=True):
            self._next += 1
            yield with_timestamps(batch, self.times[rows])

    def state_dict(self) -> dict[str, int]:
        """Return which batch comes next."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there at the next ``iter``."""
        self._next, self._restored = state["next"], True


def with_timestamps(batch: Any, times: Array) -> Any:
    """Return ``batch`` with the Unix seconds of its rows, int64 because mixed precision casts what floats.

    A dict gets the key; of a list, the dict at its end, or a new one.

    Raises:
        ValueError: It is neither.

    Example:
        >>> with_timestamps({"x": 0}, np.array([7.5]))
        {'x': 0, 'timestamp': tensor([7])}
        >>> with_timestamps((1, 2), np.array([7.5]))
        [1, 2, {'timestamp': tensor([7])}]
    """
    known = {"timestamp": torch.as_tensor(np.floor(times).astype(np.int64))}
    if isinstance(batch, Mapping):
        return {**batch, **known}
    if not isinstance(batch, list | tuple):
        raise ValueError(f"a batch of the data set is a {type(batch).__name__} -> make its rows (x, y) or dicts")
    return [*batch[:-1], {**batch[-1], **known}] if isinstance(batch[-1], Mapping) else [*batch, known]


def portions(rows: np.ndarray[Any, Any], size: int, ranks: int) -> list[np.ndarray[Any, Any]]:
    """Return ``rows`` in order, ``size`` for each of ``ranks`` at a time; none goes without in the last portion.

    Its rows go to the portion before if they are too few; if there is none, they are repeated.

    Example:
        >>> [p.tolist() for p in portions(np.arange(5), size=2, ranks=1)]
        [[0, 1], [2, 3], [4]]
        >>> [p.tolist() for p in portions(np.arange(5), size=2, ranks=2)]
        [[0, 1, 2, 3, 4]]
        >>> [p.tolist() for p in portions(np.arange(1), size=2, ranks=2)]
        [[0, 0]]
    """
    starts = list(range(0, len(rows), size * ranks))
    if len(starts) > 1 and len(rows) - starts[-1] < ranks:
        starts.pop()
    return np.split(np.resize(rows, max(len(rows), ranks)), starts[1:])


class StreamDataModule(LightningDataModule):
    """A stream for one ``trainer.fit(module, datamodule=...)`` with ``max_epochs=1``.

    Rows are sorted by time (stable), and batches of consecutive rows are made within each step, the last one of a step
    smaller; a batch is ``[x, y, {"timestamp": seconds}]``, or the dict of the rows with this key. Several processes
    share the rows of each batch; a step with fewer rows than processes repeats some.

    One ``fit`` per hour would be another algorithm: every ``fit`` makes a new optimizer, whose moments begin again, and
    ``max_steps`` counts over all of them.

    Args:
        dataset: Map-style data set of rows ``(x, y)``, or dicts.
        timestamps: Of the rows: Unix seconds, or datetimes with a time zone.
        period: Length of a step, as for :class:`LIMES`.
        batch_size: Rows of a batch, in each process.
        collate_fn: Makes a batch of a list of rows, without the timestamps.
        num_workers: Worker processes that read ahead, as for a ``DataLoader``.

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
        period: float | str = "1h",
        batch_size: int = 100,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_whole_number("batch_size", batch_size, 1)
        check_whole_number("num_workers", num_workers, 0)
        self._times = unix_seconds(timestamps)
        if len(self._times) != len(dataset):
            raise ValueError(f"{len(self._times)} timestamps for {len(dataset)} rows -> one for each row")
        self._dataset, self._collate, self._workers = dataset, collate_fn, num_workers
        self._keys = time_steps(self._times, period_seconds(period))
        order = np.argsort(self._times, kind="stable")
        bounds = np.flatnonzero(np.diff(self._keys[order])) + 1
        self._steps = np.split(order, bounds) if len(order) else []
        self._batch_size = batch_size

    def batches(self) -> list[np.ndarray[Any, Any]]:
        """Return row indices of each batch of this process, in the order of time."""
        shared = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        ranks, rank = shared.get("num_replicas", 1), shared.get("rank", 0)
        return [part[rank::ranks] for rows in self._steps for part in portions(rows, self._batch_size, ranks)]

    def train_dataloader(self) -> StreamLoader:
        """Return a loader of all rows once, in the order of time."""
        return StreamLoader(self._dataset, self.batches(), self._times, self._collate, self._workers)

    def step_counts(self, step: int, num_classes: int) -> Array:
        """Return how often each label occurs in ``step``, for ``training_prior="realised"``; shape (K,)."""
        counts = np.zeros(num_classes)
        rows = np.flatnonzero(self._keys == step)
        for part in np.split(rows, range(self._batch_size, len(rows), self._batch_size)):
            counts += self._counted(part, num_classes) if len(part) else 0.0
        return counts

    def _counted(self, rows: np.ndarray[Any, Any], classes: int) -> Array:
        batch = with_timestamps(self._collate([self._dataset[int(i)] for i in rows]), self._times[rows])
        fields = default_fields(batch)
        if fields is None or fields.targets is None:
            raise ValueError("the labels of the rows are not found -> make rows (x, y), or override step_counts()")
        targets = torch.as_tensor(fields.targets)
        shares = targets.is_floating_point() and targets.dim() > 1 and targets.shape[-1] == classes
        labels = labels_of(targets, classes, targets.numel() // (classes if shares else 1))
        return np.asarray(labels.counts(labels.weights()).numpy())
