"""What CrAM's part of an optimizer step costs, beside copying the parameters once.

25.5 million parameters in the 161 tensors of a ResNet-50, sparsity 0.9. The unit is 1 mc: the time that ``copy_`` takes
for all parameters as one f32 tensor, measured in turn with everything else. ``--gpu`` gives the fraction of the copy
bandwidth that the Triton programs reach on a CUDA device.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from measure import Row, interleaved, show, write
from torch import Tensor

from groundwire_cram import kernels
from groundwire_cram.kernels.base import Kernels, Part
from groundwire_cram.kernels.buffers import Buffers

SPARSITY, RHO = 0.9, 0.05
#: Target for the median, by backend and part of the step; for ATen only the sum has one.
TARGETS = {
    ("numba", "threshold"): 4.5,
    ("numba", "perturb and mask"): 2.1,
    ("numba", "combine"): 2.0,
    ("numba", "sum"): 8.5,
    ("numba", "sum with the fused SGD"): 10.5,
    ("aten", "sum"): 20.0,
}
#: Bytes that a part reads and writes for each f32 parameter.
TRAFFIC = {"threshold": 16, "perturb and mask": 16, "combine": 20}


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The parameters of a ResNet-50 for 1000 classes, in order."""
    shapes: list[tuple[int, ...]] = []

    def convolution(out: int, into: int, side: int) -> None:
        shapes.extend([(out, into, side, side), (out,), (out,)])  # The weight, and BatchNorm's two.

    convolution(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, side in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                convolution(out, into, side)
            if block == 0:
                convolution(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


class Step:
    """Parameters with gradients, and the three parts of a step on them."""

    def __init__(self, backend: Kernels, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.backend = backend
        tensors = [[torch.randn(s, device=device) * 0.02 for s in resnet50_shapes()] for _ in range(3)]
        self.weights, self.first, self.second = tensors
        self.saved = list(Buffers().like({str(i): w for i, w in enumerate(self.weights)}).values())
        self.prunable = [i for i, w in enumerate(self.weights) if w.dim() > 1]
        self.others = [i for i, w in enumerate(self.weights) if w.dim() == 1]
        size = sum(self.weights[i].numel() for i in self.prunable)
        self.rank = size - math.ceil(size * (1 - SPARSITY)) + 1
        self.limit = self.threshold()

    def threshold(self) -> float:
        return self.backend.thresholds(self.part(self.prunable), [self.rank]).values[0]

    def part(self, which: Sequence[int]) -> Part:
        return Part([self.weights[i] for i in which], [self.first[i] for i in which], RHO)

    def perturb(self) -> None:
        for which, limit in ((self.prunable, self.limit), (self.others, None)):
            self.backend.perturb(self.part(which), limit, [self.saved[i] for i in which])

    def combine(self) -> None:
        for which, limit in ((self.prunable, self.limit), (self.others, None)):
            saved, two = ([ts[i] for i in which] for ts in (self.saved, self.second))
            self.backend.combine(self.part(which), limit, saved, two, plus=True)


class Published:
    """The published rule as one would write it from its description, without looking for speed."""

    def __init__(self) -> None:
        step = Step(kernels.select("reference")[0])
        self.weights, self.first, self.second = step.weights, step.first, step.second
        self.prunable = step.prunable
        self.saved = [w.clone() for w in self.weights]
        self.threshold()

    def threshold(self) -> None:
        moved = [w + g * RHO for w, g in zip(self.weights, self.first, strict=True)]
        magnitudes = torch.cat([moved[i].abs().flatten() for i in self.prunable])
        self.limit = torch.topk(magnitudes, math.ceil(len(magnitudes) * (1 - SPARSITY))).values[-1]

    def perturb(self) -> None:
        self.saved = [w.clone() for w in self.weights]
        self.masks = {}
        for i, (w, g) in enumerate(zip(self.weights, self.first, strict=True)):
            w.add_(g * RHO)
            if w.dim() > 1:
                self.masks[i] = (w.abs() > self.limit).float()
                w.mul_(self.masks[i])

    def combine(self) -> None:
        for i, (w, saved) in enumerate(zip(self.weights, self.saved, strict=True)):
            w.copy_(saved)
            if i in self.masks:
                self.second[i].mul_(self.masks[i])
            self.second[i].add_(self.first[i])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(quick: bool = False, thread_counts: Sequence[int] = (1, 2)) -> list[Row]:
    """Every part of the step, for each backend and number of threads."""
    rows = []
    for count in thread_counts:
        with threads(count):
            rows += _measure(count, 5 if quick else 15)
    return rows


def _measure(threads: int, repeats: int) -> list[Row]:
    steps = {name: Step(kernels.select(name)[0]) for name in ("numba", "aten")} | {"published rule": Published()}
    ways: dict[str, Callable[[], float]] = {"copy": _copy(), "fused SGD": timed(_sgd())}
    for name, step in steps.items():
        for part, run in (("threshold", step.threshold), ("perturb and mask", step.perturb), ("combine", step.combine)):
            ways[f"{name}: {part}"] = timed(run)
    seconds = interleaved(f"kernels, {threads} threads", repeats, ways)
    unit = seconds.pop("copy")
    mc = {way: [value / one for value, one in zip(values, unit, strict=True)] for way, values in seconds.items()}
    ending = f"{threads} thread{'s' if threads > 1 else ''}"
    rows = [Row(f"copy of all parameters, {ending}", "ms", [1e3 * s for s in unit])]
    rows.append(Row(f"fused SGD with momentum, {ending}", "mc", mc["fused SGD"]))
    for name in steps:
        parts = {part: mc[f"{name}: {part}"] for part in TRAFFIC}
        parts["sum"] = [sum(values) for values in zip(*parts.values(), strict=True)]
        parts["sum with the fused SGD"] = [a + b for a, b in zip(parts["sum"], mc["fused SGD"], strict=True)]
        rows += [Row(f"{name}: {p}, {ending}", "mc", values, TARGETS.get((name, p))) for p, values in parts.items()]
    return rows


def timed(run: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return seconds


def _copy() -> Callable[[], float]:
    size = sum(map(math.prod, resnet50_shapes()))
    source, target = torch.randn(size), torch.empty(size)
    return timed(lambda: target.copy_(source))


def _sgd() -> Callable[[], object]:
    parameters = [torch.nn.Parameter(torch.randn(s)) for s in resnet50_shapes()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True).step


def measure_gpu(quick: bool = False) -> list[Row]:
    """The fraction of the bandwidth of a device copy that each Triton part reaches; nothing without such a device."""
    if not torch.cuda.is_available():
        return []
    step = Step(kernels.select("triton", [torch.empty(1, device="cuda")])[0], "cuda")
    source: Tensor = torch.cat([w.flatten() for w in step.weights])
    target = torch.empty_like(source)
    ways = {"copy": lambda: target.copy_(source), "threshold": step.threshold}
    ways |= {"perturb and mask": step.perturb, "combine": step.combine}
    repeats = 10 if quick else 50
    seconds = interleaved("kernels on CUDA", repeats, {name: _on_device(run) for name, run in ways.items()})
    speed = [8 / s for s in seconds["copy"]]
    return [
        Row(f"triton: {part}", "of copy bandwidth", [TRAFFIC[part] / s / v for s, v in zip(found, speed, strict=True)])
        for part, found in seconds.items()
        if part != "copy"
    ]


def _on_device(run: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--gpu", action="store_true", help="the Triton programs on a CUDA device, and nothing else")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all values there")
    arguments = parser.parse_args()
    rows = measure_gpu(arguments.quick) if arguments.gpu else measure(arguments.quick, arguments.threads)
    if arguments.gpu and not rows:
        print("not measured: no CUDA device")
    else:
        show(rows)
    if arguments.json:
        write(arguments.json, rows, quick=arguments.quick, gpu=arguments.gpu, threads=arguments.threads)


if __name__ == "__main__":
    main()
