"""How accurate a model is after one-shot pruning, by how it was trained: real data, paired seeds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from measure import Row
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from groundwire import GradientStep, Plugin, hookimpl
from groundwire_cram import CrAM, prune, recalibrate_batchnorm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import Net, accuracy
from digits import Data, digits, files

LEVELS = (0.8, 0.9, 0.95)
RECIPE = {"sparsities": (0.5, 0.7, 0.8, 0.9, 0.95), "rho": 0.05}
#: (way of training, version): the mean accuracy to reach on the digits, in %.
TARGETS = {("CrAM", "90 %"): 98.3, ("CrAM", "95 %"): 97.5}


class SAM(Plugin):
    """Sharpness-aware minimization with its usual radius, as a peer with the same two passes."""

    @hookimpl
    def gw_gradient(self, step: GradientStep) -> Mapping[str, torch.Tensor]:
        norm = torch.nn.utils.get_total_norm(list(step.grads.values()))
        with step.perturbed() as weights:
            for name, grad in step.grads.items():
                weights[name].add_(grad * (0.05 / norm))
            return step.replay()


class Model(Net):
    """The demo's program with another learning rate or other layers."""

    def __init__(self, classes: int, epochs: int, lr: float = 0.1, layers: nn.Module | None = None) -> None:
        super().__init__(classes, epochs)
        self.lr = lr
        self.layers = layers or self.layers

    def configure_optimizers(self):
        [optimizer], _ = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.lr
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def perceptron(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes)
    )


#: Per way: how many times the epochs, how many times the learning rate, and the callbacks.
WAYS: dict[str, tuple[int, float, Callable[[], list[pl.Callback]]]] = {
    "SGD": (1, 1.0, list),
    "SGD, epochs x 2": (2, 1.0, list),
    "SGD, lr x 2": (1, 2.0, list),
    "SAM": (1, 1.0, lambda: [SAM()]),
    "CrAM": (1, 1.0, lambda: [CrAM(**RECIPE)]),
}


def trained(data: Data, way: str, epochs: int, seed: int, mlp: bool) -> Model:
    times, lr, callbacks = WAYS[way]
    pl.seed_everything(seed, verbose=False)
    pixels = data.train.tensors[0][0].numel()
    layers = perceptron(pixels, data.classes) if mlp else None
    model = Model(data.classes, times * epochs, lr * (0.05 if mlp else 0.1), layers)
    trainer = pl.Trainer(
        max_epochs=times * epochs,
        callbacks=callbacks(),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data.train, batch_size=64, shuffle=True))
    return model


def versions(model: Model, data: Data) -> dict[str, float]:
    """Test accuracy in %, dense and pruned with BatchNorm recalibrated."""
    sample = RandomSampler(data.train, replacement=True, num_samples=20 * 128)
    loader = DataLoader(data.train, batch_size=128, sampler=sample)
    found = {"dense": accuracy(model, data.test)}
    for level in LEVELS:
        pruned = prune(model, level)
        if any(isinstance(m, nn.BatchNorm2d) for m in pruned.modules()):
            recalibrate_batchnorm(pruned, loader, batches=20)
        found[f"{100 * level:g} %"] = accuracy(pruned, data.test)
    return found


def rows(name: str, load: Callable[[int], Data], seeds: int, epochs: int, mlp: bool = False) -> list[Row]:
    """One row for each way of training and version; on the digits with the targets."""
    found: dict[tuple[str, str], list[float]] = {}
    for seed in track(range(seeds), f"{name}: training {len(WAYS)} ways", transient=True):
        data = load(seed)
        for way in WAYS:
            for version, value in versions(trained(data, way, epochs, seed, mlp), data).items():
                found.setdefault((way, version), []).append(value)
    targets = TARGETS if name == "digits" else {}
    result = [
        Row(f"{name}, {way}, {version}", "%", values, targets.get((way, version)), at_least=True, of_mean=True)
        for (way, version), values in found.items()
    ]
    if name == "digits":
        lost = [a - b for a, b in zip(found["SGD", "dense"], found["CrAM", "dense"], strict=True)]
        result.append(Row("digits, dense: SGD - CrAM", "points", lost, 0.3, of_mean=True))
    return result


def measure(quick: bool, data: Path | None, seeds: int | None = None) -> Sequence[Row]:
    """The digits recipe; with ``data`` also MNIST-format files, with a convolutional network and a perceptron."""
    torch.set_num_threads(1)
    result = rows("digits", digits, seeds or (1 if quick else 5), 3 if quick else 15)
    if data is not None:
        load = partial(files, data, limit=1000 if quick else None)
        for mlp, name in ((False, "files, convnet"), (True, "files, perceptron")):
            result += rows(name, load, seeds or (1 if quick else 3), 1 if quick else 8, mlp)
    return result
