"""Dataset indices of the rows of a batch.

The main process draws the indices, whatever number of workers then loads the rows, so the loader's sampler is the
place to listen. An iterable data set has no indices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from groundwire._lightning import evaluation_loop, instance_attribute, one_after_another
from groundwire.run import BatchStart, Run
from groundwire.service import Service
from groundwire.train_data import KeptRows


class RecordingSampler:
    """A sampler that remembers, in order, what it gave and nobody asked for yet.

    Args:
        sampler: The loader's own.
        rows: Where rows of the data set were kept, their indices in the user's own data set.
    """

    def __init__(self, sampler: Any, rows: Sequence[int] | None = None) -> None:
        self._sampler = sampler
        self._rows = rows
        self._given: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        given: deque[list[int]] = deque()
        self._given = given
        for indices in self._sampler:
            given.append(list(indices) if isinstance(indices, list | tuple) else [indices])
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sampler"], name)

    def take(self) -> list[int] | None:
        """Return the indices of the oldest batch not taken yet."""
        if not self._given:
            return None
        places = self._given.popleft()
        return places if self._rows is None else [self._rows[place] for place in places]


class SampleIdService(Service):
    """Keeps :attr:`RunContext.ids` current, if a plugin needs it."""

    name = "groundwire-sample-ids"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._recorders: dict[int, RecordingSampler] = {}
        run.members["ids"] = None

    @property
    def wanted(self) -> bool:
        """True if a plugin needs ids."""
        return any(getattr(plugin, "needs_ids", False) for plugin in self.run.plugins)

    def open(self) -> None:
        """Listen to every loader that Lightning prepares from now on."""
        if not self.wanted:
            return
        strategy = self.run.trainer.strategy
        original = strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            self._listen(loader)
            return original(loader)

        self.run.undo.enter_context(instance_attribute(strategy, "process_dataloader", process_dataloader))
        for stage in ("sanity", "validate", "test", "predict"):
            self.run.before_batch[stage].append(self._before_batch)

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        """Return the hook before a training batch: other callbacks may ask for its ids there."""
        return {"on_train_batch_start": lambda *_: self._take("train", 0)} if self.wanted else {}

    def _listen(self, loader: Any) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        rows = loader.dataset.indices if isinstance(loader.dataset, KeptRows) else None
        recorder = RecordingSampler(getattr(loader, name), rows)
        # DataLoader refuses to have its sampler set after construction, and a rebuilt loader would not be the user's.
        self.run.undo.enter_context(instance_attribute(loader, name, recorder))
        self._recorders[id(loader)] = recorder

    def _side_by_side(self) -> bool:
        trainer = self.run.trainer
        return self.run.stage != "predict" and not one_after_another(evaluation_loop(trainer))

    def _before_batch(self, start: BatchStart) -> None:
        self._take(self.run.stage, start.dataloader_idx)

    def _take(self, stage: str, dataloader_idx: int) -> None:
        """Take the indices of the batch that is about to be used."""
        loaders = self.run.loaders(stage)
        # Of loaders that are read side by side, a batch has rows of each.
        mixed = len(loaders) > 1 and (stage == "train" or self._side_by_side())
        recorder = None if mixed else self._recorders.get(id(loaders[dataloader_idx]))
        self.run.members["ids"] = recorder.take() if recorder is not None else None
