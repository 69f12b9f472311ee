"""Accuracy, certified accuracy and attacks on small images: the converted stock CNN, the native AOL net, and peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from aol_rows import Figure
from aol_timing import FirstChannels
from rich.progress import track
from torch import Tensor, nn

from groundwire_aol import (
    AOLConv2d,
    AOLLinear,
    MaxMin,
    NActivation,
    OffsetCrossEntropy,
    audit_bound,
    certified_accuracy,
    lipschitz,
    lipschitz_bound,
)
from groundwire_aol.certify.attacks import max_jacobian_norm

RADII = (0.0, 36 / 255, 72 / 255, 108 / 255, 0.5, 1.0)
OFFSET = math.sqrt(2) / 4


@dataclass(frozen=True)
class Split:
    """Images in [0, 1] and labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trained:
    """What came of one training; ``bound`` is None for a peer, whose own promise of 1 is taken."""

    accuracies: list[float]
    seconds: float
    bound: float | None
    module: nn.Module
    mean: float


def native(
    conv: Callable[..., nn.Module], dense: Callable[..., nn.Module], activation: Callable[[int], nn.Module], side: int
) -> nn.Sequential:
    """A 1 x 1 convolution and three blocks of three 3 x 3 ones, width 16 to 128."""
    width, layers = 16, [conv(1, 16, 1)]
    for _ in range(3):
        for _ in range(3):
            layers += [conv(width, width, 3, padding=1), activation(width)]
        layers += [FirstChannels(width // 2), nn.PixelUnshuffle(2)]
        width, side = 2 * width, side // 2
    return nn.Sequential(*layers, nn.Flatten(), dense(width * side * side, 10))


def stock(side: int, width: int = 16) -> nn.Sequential:
    """An ordinary CNN as people write it: BatchNorm, ReLU, convolutions of stride 2 in place of pools."""

    def block(i: int, o: int, size: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, size, stride, padding=size // 2 if stride == 1 else 0), nn.BatchNorm2d(o), nn.ReLU()]

    layers = block(1, width, 3, 1)
    for wide in (width, 2 * width):
        layers += block(wide, 2 * wide, 2, 2) + block(2 * wide, 2 * wide, 3, 1)
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(4 * width * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def aol(steps: int = 1, activation: Callable[[int], nn.Module] = lambda _: MaxMin()) -> Callable[[int], nn.Module]:
    return lambda side: native(
        lambda *a, **k: AOLConv2d(*a, **k, steps=steps), lambda i, o: AOLLinear(i, o, steps=steps), activation, side
    )


def orthogonium_aoc(side: int) -> nn.Module:
    from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
    from orthogonium.layers.linear import OrthoLinear

    return native(
        lambda i, o, k, padding=0: AdaptiveOrthoConv2d(i, o, k, padding=padding, padding_mode="circular"),
        OrthoLinear, lambda _: MaxMin(), side,
    )  # fmt: skip


def torchlip_spectral(side: int) -> nn.Module:
    from deel import torchlip

    return native(torchlip.SpectralConv2d, torchlip.SpectralLinear, lambda _: MaxMin(), side)


WAYS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "AOL": (aol(), 0.1),
    "AOL, steps=2": (aol(2), 0.1),
    "AOL, N-activation": (aol(activation=NActivation), 0.1),
    "converted stock CNN": (lambda side: lipschitz(stock(side), torch.rand(1, 1, side, side))[0], 0.3),
    "orthogonium AOC": (orthogonium_aoc, 0.02),
    "torchlip spectral": (torchlip_spectral, 0.1),
}
PEERS = ("orthogonium AOC", "torchlip spectral")


def train(way: str, data: Split, seed: int, epochs: int) -> Trained:
    """SGD with Nesterov momentum, one-cycle rate, batch 64; only the mean of all pixels is subtracted."""
    (x, y), (test_x, test_y) = data.train, data.test
    torch.manual_seed(seed)
    make, lr = WAYS[way]
    net = make(x.shape[-1])
    mean, batches = float(x.mean()), math.ceil(len(x) / 64)
    loss = OffsetCrossEntropy(OFFSET, 0.25)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    start = time.process_time()
    for _ in track(range(epochs), "Training", transient=True):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss(net(x[rows] - mean), y[rows]).backward()
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - start
    net.eval()
    bound = None if way in PEERS else float(lipschitz_bound(net, test_x[:1]))
    with torch.no_grad():
        scores = torch.cat([net(part - mean) for part in test_x.split(256)])
    # A peer keeps its promise of 1, if no Jacobian contradicts it.
    constant = bound if bound is not None else max(1.0, max_jacobian_norm(net, test_x[:5] - mean))
    return Trained(certified_accuracy(scores, test_y, RADII, constant).tolist(), seconds, bound, net, mean)


def digits_targets(results: Mapping[str, list[Trained]]) -> list[Figure]:
    converted, reference = results["converted stock CNN"], results["AOL"]
    figures = []
    for column, name, target in ((0, "clean", 0.94), (1, "certified at 36/255", 0.875)):
        values = [t.accuracies[column] for t in converted]
        gaps = [a.accuracies[column] - b.accuracies[column] for a, b in zip(converted, reference, strict=True)]
        figures.append(Figure(f"digits, converted stock CNN: {name}", "accuracy", values, target, True, "mean"))
        figures.append(Figure(f"digits, converted minus native AOL: {name}", "accuracy", gaps, -0.015, True, "mean"))
    return figures


def attacks(results: list[Trained], data: Split, samples: int) -> list[Figure]:
    """Attacks inside the certified radius, on the native net and the converted one."""
    attacked, successes, jacobian = [], [], []
    for trained in results:
        x, y = data.test
        audit = audit_bound(trained.module, [(x - trained.mean, y)], samples=samples, jacobians=10)
        attacked.append(audit.attacked)
        successes.append(audit.successes)
        jacobian.append(audit.jacobian / audit.bound)
    return [
        Figure(
            "attacks that succeed inside the certified radius",
            "count",
            successes,
            0,
            by="max",
            note=f"{sum(attacked)} points",
        ),
        Figure("attacked points, per net", "count", attacked),
        Figure("Jacobian norm / bound of trained nets", "ratio", jacobian, 1.0, by="max"),
    ]


def roundings(results: Mapping[str, list[Trained]], data: Split) -> list[Figure]:
    """What it costs to cover the rounding of float32 by its proved bound."""
    x, y = data.test
    figures = []
    for name, nets in results.items():
        taken, covered = [], []
        for trained in nets:
            inputs = x - trained.mean
            bound = lipschitz_bound(trained.module, inputs[:1])
            with torch.no_grad():
                scores = trained.module(inputs)
            covered.append(float(certified_accuracy(scores, y, RADII[1:2], bound, inputs=inputs)))
            largest = bound.rounding.error(inputs.double().flatten(1).norm(dim=1)).max()
            taken.append(2 * float(largest) / float(bound))
        figures.append(Figure(f"{name}: 36/255 with rounding covered", "accuracy", covered, by="mean"))
        figures.append(Figure(f"{name}: what rounding takes of a radius", "pixels", taken, by="max"))
    return figures


def table(
    name: str, data: Split, seeds: int, epochs: int, ways: list[str]
) -> tuple[list[Figure], dict[str, list[Trained]]]:
    """Every way with every seed."""
    results: dict[str, list[Trained]] = {}
    figures = []
    for way in ways:
        results[way] = [train(way, data, seed, epochs) for seed in range(seeds)]
        note = "bound of 1 is the peer's own promise" if way in PEERS else ""
        for column, radius in enumerate(("clean", "36/255", "72/255", "108/255", "0.5", "1.0")):
            values = [t.accuracies[column] for t in results[way]]
            figures.append(
                Figure(f"{name}, {way}: {radius}", "accuracy", values, by="mean", note=note if not column else "")
            )
        figures.append(Figure(f"{name}, {way}: training", "CPU s", [t.seconds for t in results[way]], by="mean"))
    return figures, results


def as_split(data: Any) -> Split:
    return Split(data.train.tensors, data.test.tensors)
