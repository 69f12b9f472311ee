"""What LIMES adds to a training step: a bare linear head, and a small convolutional network.

Beside it stands the floor: what a callback and a plugin cost that do nothing, and one that does only what LIMES cannot
do without, which is to write a vector into the head at each batch and to be given the scores.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from measure import Row, interleaved
from torch import nn
from torch.nn import functional as F

from groundwire import Plugin, Plugins, hookimpl
from groundwire_limes import LIMES
from groundwire_limes.logit_offset import LogitOffset

WARM_UP, BATCHES_PER_HOUR = 20, 10


class Linear(pl.LightningModule):
    """The published learner: 512 features, 250 classes. Takes the processor time of its training steps."""

    shape, classes = (512,), 250

    def __init__(self) -> None:
        super().__init__()
        self.net = self.network()

    def network(self):
        return nn.Linear(512, 250)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == WARM_UP:
            self.begin = time.process_time()

    def on_train_epoch_end(self):
        self.seconds = time.process_time() - self.begin


class ConvNet(Linear):
    """Three convolutions on 32x32 images."""

    shape, classes = (3, 32, 32), 10

    def network(self):
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)


class Hours:
    """The same rows again and again, with time going by."""

    def __init__(self, module: type[Linear], rows: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, *module.shape, generator=generator)
        y = torch.randint(module.classes, (rows,), generator=generator)
        hours = range(0, 3600 * (1 + steps // BATCHES_PER_HOUR), 3600)
        self.times = [torch.full((rows,), h, dtype=torch.float64) for h in hours]
        self.batch, self.steps = (x, y), steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return ([*self.batch, {"timestamp": self.times[i // BATCHES_PER_HOUR]}] for i in range(self.steps))


class IdleCallback(pl.Callback):
    """Lightning's share: the two hooks that LIMES has in a training batch, empty."""

    def on_train_batch_start(self, *_):
        pass

    def on_train_batch_end(self, *_):
        pass


class IdlePlugin(Plugin):
    """The core's share."""

    def on_train_batch_start(self, *_):
        pass

    def on_train_batch_end(self, *_):
        pass


class Floor(IdlePlugin):
    """A vector for each batch, added by a hook on the head, and the scores of each batch, looked at by nobody."""

    score_stages, changes = ("train",), "shift"

    def __init__(self):
        self.hook = None

    @hookimpl
    def gw_batch_start(self, run):
        if self.hook is None:
            self.hook = LogitOffset()
            run.on_close(run.head.module.register_forward_hook(self.hook).remove)
        self.hook.vector = torch.zeros(run.head.module.out_features)

    @hookimpl
    def gw_scores(self, fields):
        pass


WAYS: dict[str, Callable[[], list[pl.Callback]]] = {
    "without": list,
    "an idle callback": lambda: [IdleCallback()],
    "an idle plugin": lambda: [Plugins([IdlePlugin()], report=False)],
    "a plugin that only writes a vector and is given scores": lambda: [Plugins([Floor()], report=False)],
    "LIMES": lambda: [Plugins([LIMES()], report=False)],
}


def seconds_per_step(module: type[Linear], rows: int, steps: int, way: str) -> float:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=WAYS[way](),
        )
        trainer.fit(module(), Hours(module, rows, steps + WARM_UP))
    return trainer.lightning_module.seconds / steps


def cost(repeats: int, steps: int) -> list[Row]:
    """Ratios of the time of a step, repeat by repeat."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available).*")
    torch.set_num_threads(1)
    rows = []
    for name, module, batch, few, target, ways in (
        ("bare linear head, 512 to 250", Linear, 100, steps, 1.05, list(WAYS)),
        ("small convnet", ConvNet, 32, max(1, steps // 4), 1.01, ["without", "LIMES"]),
    ):
        found = interleaved(name, repeats, {way: partial(seconds_per_step, module, batch, few, way) for way in ways})
        rows.append(Row(f"step without, {name}", "us", [1e6 * v for v in found["without"]]))
        for way in ways[1:]:
            ratios = [one / other for one, other in zip(found[way], found["without"], strict=True)]
            aim = target if way == "LIMES" else None
            rows.append(Row(f"step with {way} / without, {name}", "ratio", ratios, target=aim))
    return rows
