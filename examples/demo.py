"""The same LightningModule and Trainer without and with CrAM, then pruned in one shot."""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits import Data, digits, files
from idx import IDXError
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from groundwire_cram import CrAM, prune, recalibrate_batchnorm

# An ordinary Lightning program


class Net(pl.LightningModule):
    def __init__(self, classes: int, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
        )

    def forward(self, images):
        return self.layers(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def train(data: Data, epochs: int, seed: int, folder: Path, callbacks: Sequence[pl.Callback]) -> tuple[Net, pl.Trainer]:
    pl.seed_everything(seed)
    model = Net(data.classes, epochs)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name=None),
        accelerator="cpu",
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data.train, batch_size=64, shuffle=True), DataLoader(data.test, batch_size=512))
    return model, trainer


# The comparison: that program as it is, with twice the epochs, and with one callback

PRUNED = (0.8, 0.9, 0.95)
#: Per way of training, per seed: test accuracy in %, dense and at each level of PRUNED.
Results = dict[str, list[list[float]]]


def ways(epochs: int) -> dict[str, tuple[int, list[pl.Callback]]]:
    cram = CrAM(sparsities=(0.5, 0.7, 0.8, 0.9, 0.95), rho=0.05, evaluate_every=max(1, epochs // 3))
    return {"SGD": (epochs, []), "SGD twice as long": (2 * epochs, []), "SGD with CrAM": (epochs, [cram])}


def accuracies(model: Net, data: Data) -> list[float]:
    sample = RandomSampler(data.train, replacement=True, num_samples=20 * 128)
    loader = DataLoader(data.train, batch_size=128, sampler=sample)
    pruned = [recalibrate_batchnorm(prune(model, level), loader, batches=20) for level in PRUNED]
    return [accuracy(version, data.test) for version in (model, *pruned)]


@torch.no_grad()
def accuracy(model: Net, test: TensorDataset) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(test, batch_size=512))
    return 100 * right / len(test)


def compare(load: Callable[[int], Data], seeds: int, epochs: int, output: Path) -> tuple[Results, Path]:
    """The results, and the report page of the last training with CrAM."""
    results: Results = {name: [] for name in ways(epochs)}
    datasets = [load(seed) for seed in range(seeds)]
    with progress(seeds * sum(n for n, _ in ways(epochs).values())) as tick:
        for seed, data in enumerate(datasets):
            for name, (n, callbacks) in ways(epochs).items():
                ticking = LambdaCallback(on_train_epoch_end=partial(tick, f"{name}, seed {seed}"))
                folder = output / name.replace(" ", "-")
                model, trainer = train(data, n, seed, folder, [ticking, *callbacks])
                results[name].append(accuracies(model, data))
    return results, Path(trainer.log_dir) / "groundwire" / "report.html"


# What is shown


@contextmanager
def progress(epochs: int) -> Iterator[Callable[..., None]]:
    text, left = TextColumn("{task.description:<25}"), TextColumn("epochs, time left")
    with Progress(text, BarColumn(), MofNCompleteColumn(), left, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=epochs)
        yield lambda what, *_: bar.update(task, description=what, advance=1)


def table(results: Results, title: str) -> Table:
    shown = Table(title=title)
    shown.add_column("trained with")
    for head in ("dense", *(f"{level:.0%} pruned" for level in PRUNED)):
        shown.add_column(head, justify="right")
    for name, rows in results.items():
        shown.add_row(name, *(mean_and_sd(column) for column in zip(*rows, strict=True)))
    return shown


def mean_and_sd(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def summary(results: Results) -> str:
    """What to look at, from the numbers of this run."""
    means = {name: [statistics.mean(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}
    kept = ", ".join(f"{name} keeps {values[-1]:.1f} of {values[0]:.1f} %" for name, values in means.items())
    return f"To see: with {PRUNED[-1]:.0%} of the weights set to zero, without retraining, {kept}."


def quiet() -> None:
    """Lightning's advice on devices and loader workers does not apply to so small a program."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available).*")


def main(
    data: Path | None = None,
    seeds: PositiveInt = 2,
    epochs: PositiveInt = 15,
    limit: PositiveInt | None = None,
    output: Path = Path("groundwire-demo"),
) -> Results:
    """Train a small convolutional network as it was, with twice the epochs, and with CrAM; prune each in one shot.

    Args:
        data: Folder with MNIST-format IDX files (*-images-idx3-ubyte, *-labels-idx1-ubyte, plain or .gz); train and
            t10k are used as they are, one pair is split 70/30. Without it: scikit-learn's digits.
        seeds: How many times to repeat everything; the table shows mean and standard deviation.
        epochs: Epochs of each training.
        limit: Use at most so many images for training, and as many for testing, drawn at random.
        output: Folder for logs, checkpoints and the report page.
    """
    quiet()
    if data is None:
        torch.set_num_threads(1)  # images of 8 x 8 pixels do not keep several busy
    load = partial(digits, limit=limit) if data is None else partial(files, data, limit=limit)
    results, page = compare(load, seeds, epochs, output)
    console = Console()
    console.print(table(results, f"Test accuracy (%); epochs: {epochs}, seeds: {seeds}"))
    console.print(summary(results), soft_wrap=True, highlight=False)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return results


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except IDXError as error:
        raise SystemExit(f"error: {error}") from None
