"""What core costs: an idle plugin, a replayed step, the import, and what it adds to a checkpoint."""

from __future__ import annotations

import argparse
import ctypes
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from measure import Row, interleaved, show, write
from torch import nn
from torch.nn import functional as F

from groundwire import GradientStep, Plugin, hookimpl

#: Steps before the clock starts: the first ones allocate, and the first replay learns what the module edits.
WARM_UP = 3
#: Options of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Idle(Plugin):
    """A plugin that does nothing."""


class Replayer(Plugin):
    """The gradient of a second pass in place of the first, and nothing else."""

    @hookimpl
    def gw_gradient(self, step: GradientStep) -> dict[str, torch.Tensor]:
        with step.perturbed(()):
            return step.replay()


class Tiny(pl.LightningModule):
    """42 parameters, so that a step is what Lightning itself takes. Takes the time of its training epoch."""

    shape, classes = (8,), 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.network()

    def network(self):
        return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.layers(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == WARM_UP:
            self.begin = time.perf_counter()

    def on_train_epoch_end(self):
        self.seconds = time.perf_counter() - self.begin


class OnePass(Tiny):
    """2.3 million parameters."""

    shape, classes = (1, 28, 28), 10

    def network(self):
        features = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        head = (nn.Linear(1568, 1200), nn.ReLU(), nn.Linear(1200, 350), nn.ReLU(), nn.Linear(350, 10))
        return nn.Sequential(*features, *head)


class TwoPasses(OnePass):
    """Two forward and two backward passes a step, without any plugin: the first gradient is dropped by zero_grad."""

    def training_step(self, batch, batch_idx):
        self.loss(batch).backward()
        return self.loss(batch)


class Batches:
    """The same batch again and again, so that loading takes no time."""

    def __init__(self, module: type[Tiny], rows: int, steps: int) -> None:
        self.batch = torch.randn(rows, *module.shape), torch.randint(module.classes, (rows,))
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.steps)


def fit(module: type[Tiny], rows: int, steps: int, *callbacks: type[pl.Callback]) -> pl.Trainer:
    torch.manual_seed(0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[callback() for callback in callbacks],
        **options,
    )
    trainer.fit(module(), Batches(module, rows, steps + WARM_UP))
    return trainer


def seconds_per_step(module: type[Tiny], rows: int, steps: int, *callbacks: type[pl.Callback]) -> float:
    return fit(module, rows, steps, *callbacks).lightning_module.seconds / steps


def keep_freed_memory() -> None:
    """Ask glibc not to give freed memory back to the system.

    It does so by the accident of what lies on top of the heap. Getting the pages of a gradient again takes up to two
    milliseconds of a step, with and without a replay, which hides what core itself costs.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def idle(repeats: int, steps: int) -> list[Row]:
    ways = {"none": (), "callback": (pl.Callback,), "plugin": (Idle,)}
    timed = {name: partial(seconds_per_step, Tiny, 4, steps, *classes) for name, classes in ways.items()}
    found = interleaved("an idle plugin", repeats, timed)

    def beyond_none(name: str) -> list[float]:
        return [1e6 * (one - none) for one, none in zip(found[name], found["none"], strict=True)]

    return [
        Row("idle plugin, per step", "us", beyond_none("plugin"), target=25),
        Row("empty callback, per step", "us", beyond_none("callback")),
        Row("step without either", "us", [1e6 * value for value in found["none"]]),
    ]


def replay(repeats: int, steps: int) -> list[Row]:
    ways = {"two passes": (TwoPasses, 64, steps), "replay": (OnePass, 64, steps, Replayer)}
    found = interleaved(
        "a replayed step", repeats, {name: partial(seconds_per_step, *way) for name, way in ways.items()}
    )
    ratios = [one / two for one, two in zip(found["replay"], found["two passes"], strict=True)]
    return [
        Row("replayed step / two passes", "ratio", ratios, target=1.03),
        Row("step of two passes", "ms", [1e3 * value for value in found["two passes"]]),
    ]


def imports(repeats: int) -> list[Row]:
    """In fresh processes, after lightning was imported there."""
    services = "from groundwire.host import SERVICES, service_class; [service_class(path) for path in SERVICES]"
    asked = {"import groundwire": "import groundwire", "import Plugin too": "import groundwire.plugin"}
    asked["import all of a run"] = services
    ways = {what: partial(import_ms, code) for what, code in asked.items()}
    found = interleaved("imports", repeats, ways)
    return [Row(what, "ms", values, target=100) for what, values in found.items()]


def import_ms(statement: str) -> float:
    code = f"import time, lightning; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return 1e3 * float(
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True).stdout
    )


def checkpoints() -> list[Row]:
    """Exact numbers, so one repeat: a model of 2.3 million parameters with its momentum."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for name, callbacks in {"without": (), "with": (Idle, Replayer)}.items():
            file = Path(folder, name)
            fit(OnePass, 64, 1, *callbacks).save_checkpoint(file)
            sizes[name] = file.stat().st_size
    return [
        Row("checkpoint with / without", "ratio", [sizes["with"] / sizes["without"]]),
        Row("checkpoint, added", "bytes", [sizes["with"] - sizes["without"]]),
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description="Measure what groundwire's core costs, each way in turn with the others."
    )
    parser.add_argument("--quick", action="store_true", help="7 repeats instead of 21")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values of all repeats")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available).*")
    # Other processes on the machine then disturb least; more threads wait for each other at every layer.
    torch.set_num_threads(1)
    keep_freed_memory()
    repeats = 7 if options.quick else 21
    rows = measure(repeats, options.steps)
    show(rows)
    if options.json is not None:
        write(options.json, rows, repeats=repeats)
    return rows


def measure(repeats: int, steps: int | None) -> list[Row]:
    if steps is not None:
        repeats = 1
    # Many short trainings for the smallest difference; few imports, as each is a process of seconds.
    few = max(1, repeats // 2)
    return [*idle(2 * repeats, steps or 500), *replay(repeats, steps or 30), *imports(few), *checkpoints()]


if __name__ == "__main__":
    main()
