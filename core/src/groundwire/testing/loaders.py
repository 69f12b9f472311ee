"""The kit's data, and a loader that a run can leave and come back to in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from groundwire.modules import overrides

CLASSES = 4
BATCH = 8


class Rows(Dataset[Any]):
    """Images of four classes, generated: each row is ``(x, y, {"groups", "source", "time"})``.

    Args:
        size: Number of rows.
        seed: Of the noise. The four classes are the same for every seed.

    Example:
        >>> x, y, meta = Rows(3)[0]
        >>> x.shape, sorted(meta)
        (torch.Size([1, 8, 8]), ['groups', 'source', 'time'])
    """

    def __init__(self, size: int = 40, seed: int = 0) -> None:
        classes = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(seed + 1)
        self.y = torch.randint(0, CLASSES, (size,), generator=generator)
        self.x = classes[self.y] + 0.5 * torch.randn(size, 1, 8, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Row ``index``; the sources are dealt out evenly and time passes by one a row."""
        return self.x[index], self.y[index], {"groups": index % 2, "source": index % 5, "time": float(index)}


class StatefulLoader:
    """A loader that knows where it is: shuffled by (seed, epoch), continued at the next batch after a resume.

    With a plain ``DataLoader`` Lightning starts the interrupted epoch again, so not even training without any plugin
    ends at the same weights. Lightning saves and restores this loader by its ``state_dict``. It counts the batches
    that were used, so it must not be read ahead.

    Args:
        dataset: Map-style data set.
        batch_size: Rows of a batch; the last one may be smaller.
        seed: Of the order.
        collate_fn: Makes a batch of a list of rows.

    Example:
        >>> loader = StatefulLoader(range(5), batch_size=2)
        >>> first, *rest = loader
        >>> twin = StatefulLoader(range(5), batch_size=2)
        >>> twin.load_state_dict({"epoch": 0, "batch": 1})
        >>> all(torch.equal(a, b) for a, b in zip(twin, rest, strict=True))
        True
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = BATCH,
        *,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.collate_fn = dataset, batch_size, seed, collate_fn
        self._epoch, self._batch = -1, 0
        self._restored = False

    @classmethod
    def like(cls, loader: Any) -> StatefulLoader:
        """One with the data of ``loader``, a ``DataLoader`` with a batch size."""
        return cls(loader.dataset, loader.batch_size or 1, collate_fn=loader.collate_fn)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        unfinished = self._restored and self._batch < len(self)
        self._restored = False
        if not unfinished:
            self._epoch, self._batch = self._epoch + 1, 0
        return self._rest(self._order())

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of the batch that comes next."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there at the next ``iter``."""
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._restored = True

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()
        return order

    def _rest(self, order: list[int]) -> Iterator[Any]:
        while self._batch < len(self):
            start = self._batch * self.batch_size
            self._batch += 1
            yield self.collate_fn([self.dataset[i] for i in order[start : start + self.batch_size]])


def plain_loader(size: int = 40, *, seed: int = 0, shuffle: bool = False) -> DataLoader[Any]:
    """A ``DataLoader`` on the kit's data."""
    return DataLoader(Rows(size, seed), BATCH, shuffle=shuffle)


def train_loader(module: Any) -> Any:
    """Training data for ``module``: the kit's, or None if the module brings its own loader."""
    return None if overrides(module, "train_dataloader") else plain_loader(shuffle=True)


def evaluation_loader(module: Any, stage: str = "val") -> Any:
    """Data for evaluating ``module``: the kit's, or None if it brings its own loader or has no such step."""
    step = "validation_step" if stage == "val" else f"{stage}_step"
    if not overrides(module, step) or overrides(module, f"{stage}_dataloader"):
        return None
    return plain_loader(16, seed=1)


def unshuffled(module: Any) -> DataLoader[Any]:
    """The training data of ``module`` in the order of its rows."""
    loader = module.train_dataloader() if overrides(module, "train_dataloader") else plain_loader()
    return DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)


def stateful(module: Any) -> StatefulLoader:
    """The training data of ``module`` in a :class:`StatefulLoader`."""
    return StatefulLoader.like(unshuffled(module))
