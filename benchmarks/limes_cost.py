"""What LIMES adds to a training step: a bare linear head, and a small convolutional network."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from measure import Row, interleaved
from torch import nn
from torch.nn import functional as F

from groundwire import Plugins
from groundwire_limes import LIMES

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


def seconds_per_step(module: type[Linear], rows: int, steps: int, corrected: bool) -> float:
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
            callbacks=[Plugins([LIMES()], report=False)] if corrected else [],
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
    for name, module, batch, few, target in (
        ("bare linear head, 512 to 250", Linear, 100, steps, 1.05),
        ("small convnet", ConvNet, 32, max(1, steps // 4), 1.01),
    ):
        timed = {kind: partial(seconds_per_step, module, batch, few, kind == "with") for kind in ("without", "with")}
        found = interleaved(name, repeats, timed)
        ratios = [one / other for one, other in zip(found["with"], found["without"], strict=True)]
        rows.append(Row(f"step with LIMES / without, {name}", "ratio", ratios, target=target))
        rows.append(Row(f"step without, {name}", "us", [1e6 * v for v in found["without"]]))
    return rows
