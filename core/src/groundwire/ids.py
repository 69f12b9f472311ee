"""Which rows of the data set a batch is made of.

The main process draws the indices, whatever number of workers then loads the rows, so the loader's sampler is the
place to listen. An iterable data set has no indices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from groundwire._lightning import instance_attribute

if TYPE_CHECKING:
    from groundwire.host import Host


class RecordingSampler:
    """A sampler that remembers, in order, what it gave and nobody asked for yet."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
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
        """Indices of the oldest batch not taken yet."""
        return self._given.popleft() if self._given else None


class IdsService:
    """Keeps :attr:`RunContext.ids` current, if a plugin needs it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._recorders: dict[int, RecordingSampler] = {}
        self._wanted = False
        self.current: list[int] | None = None

    @property
    def wanted(self) -> bool:
        """Whether a plugin needs ids."""
        return self._wanted

    def open(self) -> None:
        """Listen to every loader that Lightning prepares from now on."""
        self._wanted = any(getattr(plugin, "needs_ids", False) for plugin in self._host.plugins)
        if not self._wanted:
            return
        strategy = self._host.trainer.strategy
        original = strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            self._listen(loader)
            return original(loader)

        self._host.stack.enter_context(instance_attribute(strategy, "process_dataloader", process_dataloader))

    def _listen(self, loader: Any) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        recorder = RecordingSampler(getattr(loader, name))
        # DataLoader refuses to have its sampler set after construction, and a rebuilt loader would not be the user's.
        self._host.stack.enter_context(instance_attribute(loader, name, recorder))
        self._recorders[id(loader)] = recorder

    def before_batch(self, stage: str, dataloader_idx: int) -> None:
        """Take the indices of the batch that is about to be used."""
        if self._wanted:
            loaders = self.loaders(stage)
            several = stage == "train" and len(loaders) > 1
            recorder = None if several else self._recorders.get(id(loaders[dataloader_idx]))
            self.current = recorder.take() if recorder is not None else None

    def loaders(self, stage: str) -> list[Any]:
        """The loaders of ``stage``, flat."""
        trainer = self._host.trainer
        names = {"train": "train_dataloader", "validate": "val_dataloaders", "test": "test_dataloaders"}
        loaders = getattr(trainer, names.get(stage, "predict_dataloaders"))
        if isinstance(loaders, DataLoader):
            return [loaders]  # asked for before every batch, and flattening costs more than all the rest
        return list((loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened)
