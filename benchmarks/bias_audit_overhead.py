"""What the audit adds to a validation epoch, measured in fits that take their epochs in turn."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import lightning.pytorch as pl
import numpy as np
import torch
from measure import Row
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire import Plugin
from groundwire_bias_audit import BiasAudit


class Turns:
    """Lets several threads run one at a time, and change over where they say so."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._changed = threading.Condition()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Run ``name``'s part: begins with its first turn, and leaves the rest to the others."""
        with self._changed:
            self._changed.wait_for(lambda: self.names[0] == name)
        try:
            yield
        finally:
            with self._changed:
                self.names.remove(name)
                self._changed.notify_all()

    def over(self, name: str) -> None:
        """Let all others have a turn."""
        with self._changed:
            self.names.append(self.names.pop(0))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.names[0] == name)


class Mlp(pl.LightningModule):
    """2.3 million parameters; after each validation epoch the other fits have theirs."""

    def __init__(self, over: Callable[[], None]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1408), nn.ReLU(), nn.Linear(1408, 1))
        self.seconds: list[float] = []
        self.over = over

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def validation_step(self, batch, batch_idx):
        self.log("loss", nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float()))

    def on_validation_epoch_start(self):
        self.begin = time.thread_time()  # other programs on the machine do not count

    def on_validation_epoch_end(self):  # after the callbacks' own
        self.seconds.append(time.thread_time() - self.begin)
        self.over()


class IdleCallback(pl.Callback):
    """What any callback costs."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        pass

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        pass


class IdlePlugin(Plugin):
    """What a run costs before any plugin does something."""

    name = "idle"


def overhead(repeats: int, batches: int = 200, epochs: int = 6) -> list[Row]:
    """A validation epoch with the audit of the model itself, relative to one without.

    Fits of all ways take their epochs in turn, so each ratio is of two epochs that are close in time. The first epoch,
    in which core looks for the head, and the last one, whose samples the page shows, do not count.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(256 * batches, 784, generator=generator), torch.randint(0, 2, (256 * batches,))
    loader, groups = DataLoader(TensorDataset(x, y), 256), dict(enumerate(np.arange(len(y)) % 10))
    ways: dict[str, Callable[[], list[pl.Callback]]] = {
        "plain": list,
        "an idle callback": lambda: [IdleCallback()],
        "an idle plugin": lambda: [IdlePlugin()],
        "the audit": lambda: [BiasAudit(groups, variants=False)],
    }
    share: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in track(range(repeats), "validation epoch", transient=True):
        order = list(ways)[:: -1 if repeat % 2 else 1]
        found = in_turn({name: ways[name]() for name in order}, loader, epochs)
        for name, seconds in found.items():
            share[name] += [100 * (b / a - 1) for a, b in zip(found["plain"], seconds, strict=True)]
    rows = [
        Row(f"validation epoch, more time with {name}", "%", share[name], 3.0 if name == "the audit" else None)
        for name in list(ways)[1:]
    ]
    low, _, high = statistics.quantiles(share["the audit"], n=4)
    return [*rows, Row("the same, lower quartile", "%", [low]), Row("the same, upper quartile", "%", [high])]


def in_turn(callbacks: Mapping[str, list[pl.Callback]], loader: DataLoader, epochs: int) -> dict[str, list[float]]:
    """Seconds of the validation epochs, without the first and the last, of one fit for each list of callbacks."""
    turns, found = Turns(list(callbacks)), {}

    def fit(name: str) -> None:
        module = Mlp(lambda: turns.over(name))
        with turns.of(name), tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                callbacks=callbacks[name], accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, max_epochs=epochs,
                limit_train_batches=1, num_sanity_val_steps=0,
            )  # fmt: skip
            trainer.fit(module, loader, loader)
        found[name] = module.seconds[1:-1]

    threads = [threading.Thread(target=fit, args=[name]) for name in callbacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
