"""What AOL costs in a training step and in evaluation: ratios of interleaved process times, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from aol_rows import Figure
from measure import interleaved
from torch import nn

from groundwire_aol import AOLConv2d, MaxMin
from groundwire_aol.layers.autocorrelation import lag_sums, plain_sums
from groundwire_aol.layers.parametrization import parametrizations

Make = Callable[..., nn.Module]


class FirstChannels(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : self.n]


def lipconvnet(conv: Make, width: int = 32) -> nn.Sequential:
    """Five blocks of two convolutions, the last 1 x 1; each halves the side of 32 pixels and doubles the channels."""
    layers: list[nn.Module] = [conv(3, width, 1)]
    for block in range(5):
        size = 1 if block == 4 else 3
        for _ in range(2):
            layers += [conv(width, width, size, padding=size // 2), MaxMin()]
        if block < 4:
            layers += [FirstChannels(width // 2), nn.PixelUnshuffle(2)]
            width *= 2
    return nn.Sequential(*layers, conv(width, width, 1), nn.Flatten(), FirstChannels(10))


def makers() -> dict[str, Make]:
    from orthogonium.layers.conv.AOL.aol import AOLConv2D

    return {
        "plain": nn.Conv2d,
        "AOL": AOLConv2d,
        "AOL, published rule": lambda *a, **k: AOLConv2d(*a, **k, compat="reference"),
        "orthogonium AOL": lambda i, o, k, padding=0: AOLConv2D(i, o, k, padding=padding),
        "spectral_norm": lambda *a, **k: nn.utils.parametrizations.spectral_norm(nn.Conv2d(*a, **k)),
    }


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def training(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return lambda: seconds(step)


def ratios(found: Mapping[str, list[float]], name: str) -> list[float]:
    return [a / b for a, b in zip(found[name], found["plain"], strict=True)]


def rescale(quick: bool) -> list[Figure]:
    """Half of the lags as matrix products against one convolution, forward and backward."""
    figures = []
    for channels, size in ((64, 3), (96, 3), (128, 3), (256, 3), (128, 5), (512, 1)):
        blocks = torch.randn(1, channels, channels, size, size, requires_grad=True)

        def run(sums: Callable[[torch.Tensor], torch.Tensor], blocks: torch.Tensor = blocks) -> Callable[[], float]:
            return lambda: seconds(lambda: torch.autograd.grad(sums(blocks).sum(), blocks))

        ways = {"plain": run(plain_sums), "half of the lags": run(lag_sums)}
        found = interleaved(f"Rescale, {channels} channels", 2 if quick else 15, ways)
        what = f"rescale, {channels} channels, kernel {size}: half of the lags / convolution"
        figures.append(Figure(what, "ratio", ratios(found, "half of the lags")))
    return figures


def steps(quick: bool) -> list[Figure]:
    figures = []
    for batch, target in ((64, 1.45), (256, 1.08)):
        if quick and batch > 64:
            continue
        x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
        nets = {name: lipconvnet(make) for name, make in makers().items()}
        repeats = 2 if quick else 9
        found = interleaved(
            f"Training step, batch {batch}", repeats, {n: training(net.train(), x, y) for n, net in nets.items()}
        )
        for name in found:
            if name != "plain":
                goal = target if name == "AOL" else None
                figures.append(Figure(f"train step, batch {batch}: {name} / plain", "ratio", ratios(found, name), goal))
        figures.append(Figure(f"train step, batch {batch}: plain", "s", found["plain"]))
    return figures


def evaluation(quick: bool) -> list[Figure]:
    x = torch.rand(64, 3, 32, 32)
    nets = {name: lipconvnet(make).eval() for name, make in makers().items() if name != "AOL, published rule"}

    def run(net: nn.Module) -> Callable[[], float]:
        def forward() -> None:
            with torch.no_grad():
                net(x)

        return lambda: seconds(forward)

    found = interleaved("Evaluation", 3 if quick else 15, {name: run(net) for name, net in nets.items()})
    noise = [a / statistics.median(found["plain"]) for a in found["plain"]]
    spread = max(noise) - min(noise)
    return [
        Figure(f"evaluation: {name} / plain", "ratio", ratios(found, name), 1.0 + spread if name == "AOL" else None,
               note=f"1.00 + noise of plain itself ({spread:.2f})" if name == "AOL" else "")
        for name in found if name != "plain"
    ]  # fmt: skip


def six(conv: Make) -> nn.Sequential:
    """Two convolutions each of 64 channels at 16 x 16, 128 at 8 x 8, 256 at 4 x 4."""
    layers: list[nn.Module] = []
    for width in (64, 128, 256):
        layers += [conv(width, width, 3, padding=1), MaxMin(), conv(width, width, 3, padding=1), MaxMin()]
        if width < 256:
            layers += [FirstChannels(width // 2), nn.PixelUnshuffle(2)]
    return nn.Sequential(*layers)


def accumulated(quick: bool) -> list[Figure]:
    """Eight micro-batches of 16, as the callback runs them: the rescale once per step; and as without it."""
    batches = [torch.rand(16, 64, 16, 16) for _ in range(8)]

    def run(net: nn.Module, shared: bool) -> Callable[[], float]:
        optimizer, rules = torch.optim.SGD(net.parameters(), lr=0.01), list(parametrizations(net))

        def step() -> None:
            optimizer.zero_grad()
            for x in batches:
                net(x).square().mean().backward()
            for rule in rules:
                rule.flush()
            optimizer.step()

        for rule in rules:
            rule.accumulate(shared)
        return lambda: seconds(step)

    ways = {
        "plain": run(six(nn.Conv2d), False),
        "AOL": run(six(AOLConv2d), True),
        "AOL, rescaled for each micro-batch": run(six(AOLConv2d), False),
    }
    found = interleaved("Accumulation, 8 x 16", 2 if quick else 9, ways)
    return [
        Figure(f"accumulation 8 x 16, six convs: {n} / plain", "ratio", ratios(found, n), 1.6 if n == "AOL" else None)
        for n in ways if n != "plain"
    ]  # fmt: skip
