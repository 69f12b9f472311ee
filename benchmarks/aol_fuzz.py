"""Random graphs of all known operations: no accepted bound may be below the norm of a Jacobian of the model as it runs.

Among the moves are the kinds of models and of calls whose certificate was once false. Those must be refused.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from aol_rows import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from groundwire_aol import (
    AOLConv2d,
    AOLLinear,
    BatchCentering,
    GroupSort,
    MaxMin,
    NActivation,
    UnknownLipschitzError,
    UnsoundError,
    certified_radius,
    lipschitz_bound,
)
from groundwire_aol.layers.pooling import GlobalAvgPool, Rescaled
from groundwire_aol.layers.residual import ConvexSum, ScaledConcat

GRAPHS = 2000
#: The largest tensor in a graph: Jacobians are written out.
ENTRIES = 300
#: Bounds are of the weights as they are rounded to float32, Jacobians of weights made in float64.
TOLERANCE = 1 + 1e-6

Step = Callable[[nn.Module, Tensor], Any]
Move = Callable[["Builder", random.Random], Step]


class Graph(nn.Module):
    """Steps one after the other, each of which finds its layers in the module."""

    def __init__(self, steps: list[Step], layers: dict[str, nn.Module], buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.steps = steps
        for name, layer in layers.items():
            self.add_module(name, layer)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Any:
        for step in self.steps:
            x = step(self, x)
        return x


@dataclass
class Builder:
    """A graph in the making, with the example that went through it."""

    x: Tensor
    steps: list[Step] = field(default_factory=list)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def layer(self, layer: nn.Module) -> str:
        name = f"layer{len(self.layers)}"
        self.layers[name] = layer.eval()
        return name

    def buffer(self, tensor: Tensor) -> str:
        name = f"buffer{len(self.buffers)}"
        self.buffers[name] = tensor
        return name

    def graph(self) -> Graph:
        return Graph(list(self.steps), self.layers, self.buffers).eval()

    def try_move(self, name: str, move: Move, rng: random.Random) -> bool:
        """Add a move, if the model can still be run and stays small."""
        step = move(self, rng)
        trial = Graph([*self.steps, step], self.layers, self.buffers).eval()
        try:
            with torch.no_grad():
                found = trial(torch.rand(2, *self.x.shape[1:]))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        if not isinstance(found, Tensor) or found.dim() < 2 or len(found) != 2 or not 0 < found[0].numel() <= ENTRIES:
            return False
        self.steps.append(step)
        self.names.append(name)
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        with torch.no_grad():
            return tuple(self.graph()(torch.rand(2, *self.x.shape[1:])).shape)


def _of_layer(make: Callable[[tuple[int, ...], random.Random], nn.Module]) -> Move:
    def move(builder: Builder, rng: random.Random) -> Step:
        name = builder.layer(make(builder.shape, rng))
        return lambda m, x: getattr(m, name)(x)

    return move


def _of_function(function: Callable[[Tensor, random.Random], Any], **drawn: Callable[[random.Random], Any]) -> Move:
    def move(builder: Builder, rng: random.Random) -> Step:
        values = {name: draw(rng) for name, draw in drawn.items()}
        return lambda m, x: function(x, **values)

    return move


def _of_constant(shape: Callable[[tuple[int, ...], random.Random], tuple[int, ...]], function: Any) -> Move:
    """A function of the input and a random constant of a shape."""

    def move(builder: Builder, rng: random.Random) -> Step:
        name = builder.buffer(torch.randn(shape(builder.shape, rng)) + 0.1)
        return lambda m, x: function(x, getattr(m, name))

    return move


def _of_branch(make: Callable[[tuple[int, ...], random.Random], nn.Module], join: Any) -> Move:
    def move(builder: Builder, rng: random.Random) -> Step:
        name = builder.layer(make(builder.shape, rng))
        return lambda m, x: join(x, getattr(m, name)(x))

    return move


def _joined(make: Callable[[tuple[int, ...], random.Random], nn.Module], junction: Callable[[], nn.Module]) -> Move:
    def move(builder: Builder, rng: random.Random) -> Step:
        name, joint = builder.layer(make(builder.shape, rng)), builder.layer(junction())
        if isinstance(builder.layers[joint], ConvexSum):
            return lambda m, x: getattr(m, joint)(x, getattr(m, name)(x))
        return lambda m, x: getattr(m, joint)([x, getattr(m, name)(x), x])

    return move


def _any_convolution(shape: tuple[int, ...], rng: random.Random) -> nn.Module:
    channels, groups = shape[1], rng.choice((1, 1, shape[1]))
    modes = ("zeros", "zeros", "reflect", "replicate", "circular")
    options = {
        "stride": rng.choice((1, 1, 2)), "padding": rng.choice((0, 1, 2)), "dilation": rng.choice((1, 1, 2)),
        "groups": groups, "padding_mode": rng.choice(modes),
    }  # fmt: skip
    return nn.Conv2d(channels, groups * rng.choice((1, 2, 4)), rng.choice((1, 2, 3)), **options)


def _same_convolution(shape: tuple[int, ...], rng: random.Random) -> nn.Module:
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[1])
    kind = rng.choice((nn.Conv2d, AOLConv2d))
    return kind(shape[1], shape[1], 3, padding=1)


def _aol(shape: tuple[int, ...], rng: random.Random) -> nn.Module:
    steps = rng.choice((1, 2))
    if len(shape) == 2:
        return AOLLinear(shape[1], rng.choice((2, 4, 8)), steps=steps)
    return AOLConv2d(shape[1], rng.choice((2, 4, 6)), rng.choice((1, 2, 3)), rng.choice((1, 2)), 1, steps=steps)


def _batchnorm(shape: tuple[int, ...], rng: random.Random) -> nn.Module:
    layer: Any = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
    layer.running_var.uniform_(0.01, 3)
    layer.running_mean.normal_()
    nn.init.normal_(layer.weight)
    return layer


def _parametrized(shape: tuple[int, ...], rng: random.Random) -> nn.Module:
    layer = nn.Linear(shape[-1], 4) if len(shape) == 2 else nn.Conv2d(shape[1], 4, 3, padding=1)
    kinds = (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal)
    return rng.choice(kinds)(layer)


ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus,
    nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink,
    nn.PReLU, nn.RReLU, nn.Dropout, nn.Identity,
)  # fmt: skip
FUNCTIONS = (
    F.relu, F.relu6, torch.tanh, torch.sigmoid, torch.abs, torch.neg, F.silu, F.mish, F.gelu, F.selu, F.elu,
    F.leaky_relu, F.hardswish, F.hardtanh, F.softsign, F.logsigmoid, F.tanhshrink, F.softshrink, torch.sin, torch.cos,
    torch.clone,
)  # fmt: skip


def _factor(rng: random.Random) -> float:
    return rng.choice((-3.0, -0.5, 0.25, 1.5, 4.0))


def _axis(rng: random.Random) -> int:
    return rng.choice((1, 2, 3, -1))


def _halves(x: Tensor) -> Tensor:
    parts = x.chunk(2, 1)
    return parts[0] - 2 * parts[1]


def _expanded(builder: Builder, rng: random.Random) -> Step:
    sizes = builder.shape[2:]
    return lambda m, x: x[:, :1].expand(-1, 3, *sizes)


def _added_in_place(x: Tensor, f: Tensor) -> Tensor:
    f += x
    return f


MOVES: dict[str, Move] = {
    # Layers
    "convolution": _of_layer(_any_convolution),
    "aol": _of_layer(_aol),
    "linear": _of_layer(lambda s, r: nn.Linear(s[-1], r.choice((2, 4, 9)))),
    "transposed": _of_layer(
        lambda s, r: nn.ConvTranspose2d(s[1], 2, r.choice((2, 3)), r.choice((1, 2)), r.choice((0, 1)))
    ),
    "parametrized": _of_layer(_parametrized),
    "activation": _of_layer(lambda s, r: r.choice(ACTIVATIONS)()),
    "maxmin": _of_layer(lambda s, r: MaxMin(r.choice(("adjacent", "halves")))),
    "groupsort": _of_layer(lambda s, r: GroupSort(r.choice((2, None)))),
    "nactivation": _of_layer(lambda s, r: NActivation(s[1], "log_uniform")),
    "batchnorm": _of_layer(_batchnorm),
    "centering": _of_layer(lambda s, r: BatchCentering(s[1])),
    "max pool": _of_layer(lambda s, r: nn.MaxPool2d(r.choice((2, 3)), r.choice((1, 2, 3)), 1)),
    "average pool": _of_layer(lambda s, r: nn.AvgPool2d(r.choice((2, 3)), r.choice((1, 2)), r.choice((0, 1)))),
    "adaptive pool": _of_layer(lambda s, r: nn.AdaptiveAvgPool2d(r.choice((1, 2, 3)))),
    "global pool": _of_layer(lambda s, r: GlobalAvgPool(2)),
    "rescaled": _of_layer(lambda s, r: Rescaled(nn.MaxPool2d(3, 1, 1), 1 / 3)),
    "padding": _of_layer(
        lambda s, r: r.choice((nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.ZeroPad2d))(1)
    ),
    "upsample": _of_layer(lambda s, r: nn.Upsample(scale_factor=2, mode=r.choice(("nearest", "bilinear")))),
    "shuffle": _of_layer(lambda s, r: r.choice((nn.PixelShuffle, nn.PixelUnshuffle))(2)),
    "flatten": _of_layer(lambda s, r: nn.Flatten()),
    # Branches
    "residual": _of_branch(_same_convolution, lambda x, f: x + f),
    "difference": _of_branch(_same_convolution, lambda x, f: torch.sub(x, f, alpha=2)),
    "cat": _of_branch(_same_convolution, lambda x, f: torch.cat([x, f, x], 1)),
    "stack": _of_branch(_same_convolution, lambda x, f: torch.stack([x, f], 1).flatten(1, 2)),
    "maximum": _of_branch(_same_convolution, torch.maximum),
    "minimum": _of_branch(_same_convolution, lambda x, f: torch.min(x, f.relu())),
    "convex": _joined(_same_convolution, ConvexSum),
    "scaled cat": _joined(_same_convolution, ScaledConcat),
    "in place": _of_branch(_same_convolution, _added_in_place),
    "mean added": _of_function(lambda x: x + x.mean((2, 3), keepdim=True)),
    "mean removed": _of_function(lambda x: x - x.mean(1, keepdim=True)),
    "halves": _of_function(_halves),
    # Functions
    "function": lambda b, r: (lambda f: lambda m, x: f(x))(r.choice(FUNCTIONS)),
    "factor": _of_function(lambda x, k: k * x, k=_factor),
    "quotient": _of_function(lambda x, k: x / k, k=_factor),
    "reflected": _of_function(lambda x, k: k - x, k=_factor),
    "clamp": _of_function(lambda x, k: x.clamp(-abs(k), abs(k)), k=_factor),
    "largest": _of_function(lambda x, d: x.amax(d, keepdim=True), d=_axis),
    "largest value": _of_function(lambda x, d: x.max(d)[0].unsqueeze(1), d=_axis),
    "sorted": _of_function(lambda x, d: x.sort(d)[0], d=_axis),
    "mean": _of_function(lambda x, d: x.mean(d, keepdim=True), d=_axis),
    "sum": _of_function(lambda x, d: x.sum(d, keepdim=True), d=_axis),
    "cumsum": _of_function(lambda x, d: x.cumsum(d), d=_axis),
    "flip": _of_function(lambda x, d: x.flip(d), d=_axis),
    "roll": _of_function(lambda x, d: x.roll(1, d), d=_axis),
    "slice": _of_function(lambda x: x[:, ::2]),
    "expand": _expanded,
    "repeat": _of_function(lambda x, d: x.repeat_interleave(2, d), d=_axis),
    "permute": _of_function(lambda x: x.permute(0, 2, 3, 1)),
    "transpose": _of_function(lambda x: x.transpose(1, -1)),
    "view": _of_function(lambda x: x.reshape(x.shape[0], -1)),
    "F.pad": _of_function(
        lambda x, mode: F.pad(x, (1, 1, 0, 1), mode=mode),
        mode=lambda r: r.choice(("constant", "reflect", "replicate", "circular")),
    ),
    "F.max_pool2d": _of_function(
        lambda x, k, s: F.max_pool2d(x, k, s), k=lambda r: r.choice((1, 2, 3)), s=lambda r: r.choice((1, 2))
    ),
    "F.interpolate": _of_function(lambda x: F.interpolate(x, scale_factor=2.0)),
    "constant factor": _of_constant(
        lambda s, r: r.choice((s[1:], (s[1], *(1,) * (len(s) - 2)), (1,) * len(s))), lambda x, c: x * c
    ),
    "larger constant": _of_constant(lambda s, r: (1, s[1], *(3,) * (len(s) - 2)), lambda x, c: x + c),
    "larger factor": _of_constant(lambda s, r: (1, 3, *s[2:]), lambda x, c: x[:, :1] * c),
    "larger maximum": _of_constant(lambda s, r: (1, 3, *s[2:]), lambda x, c: torch.maximum(x[:, :1], c)),
    "limits": _of_constant(lambda s, r: (1, *s[1:]), lambda x, c: torch.clamp(x, min=c)),
    "matrix": _of_constant(lambda s, r: (s[-1], r.choice((2, 5))), lambda x, c: x @ c),
    "F.conv2d": _of_constant(lambda s, r: (2, s[1], 2, 2), lambda x, c: F.conv2d(x, c, padding=1)),
    "F.linear": _of_constant(lambda s, r: (3, s[-1]), lambda x, c: F.linear(x, c)),
}


# What was once unsound, in variants


class _Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (4 * torch.rand(())).exp()


class _DropConnect(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.9)


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * min(self.calls, 50)


def _with(kind: type[nn.Module]) -> Move:
    def make(shape: tuple[int, ...], rng: random.Random) -> nn.Module:
        layer = nn.Linear(shape[-1], 4)
        parametrize.register_parametrization(layer, "weight", kind())
        return layer

    return _of_layer(make)


def _whole(s: tuple[int, ...], r: random.Random) -> tuple[int, ...]:
    return (1, *s[1:-1], 3)


FALSE: dict[str, Move] = {
    "1 clamp, larger minimum": _of_constant(_whole, lambda x, c: torch.clamp(x.mean(-1, keepdim=True), min=c)),
    "1 clip, larger maximum": _of_constant(_whole, lambda x, c: x.mean(-1, keepdim=True).clip(max=c)),
    "1 clamp_min": _of_constant(_whole, lambda x, c: x.amax(-1, keepdim=True).clamp_min(c)),
    "1 clamp_max": _of_constant(_whole, lambda x, c: torch.clamp_max(x.sum(-1, keepdim=True), c)),
    "2 centering": _of_layer(lambda s, r: BatchCentering(64)),
    "2 nactivation": _of_layer(lambda s, r: NActivation(64)),
    "3 noise": _with(_Noise),
    "3 DropConnect": _with(_DropConnect),
    "3 counter": _with(_Counter),
    "8 softplus": _of_layer(lambda s, r: nn.Softplus(threshold=1.0)),
    "9 gradients": _of_function(lambda x: x * (5 if torch.is_grad_enabled() else 1)),
    "9 batch": _of_function(lambda x: x * x.shape[0]),
    "9 large batch": _of_function(lambda x: x * (1 + 7 * (x.shape[0] > 100))),
    "9 entries": _of_function(lambda x: x / x.numel()),
    "9 statistics": _of_function(lambda x: x - x.mean(0)),
}


@dataclass(frozen=True)
class Verdict:
    """Outcome for one graph: why it was refused, or its bound and the largest ratio that was found."""

    names: tuple[str, ...]
    refused: str
    bound: float = math.nan
    norm: float = math.nan
    misused: str = ""

    @property
    def unsound(self) -> bool:
        return bool(self.misused) or self.norm > self.bound * TOLERANCE + 1e-9


def build(seed: int) -> tuple[Graph, Tensor, tuple[str, ...]]:
    """Return a random graph and an example for it; every fifth has a move that was once unsound."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = rng.choice(((2, 4, 4), (4, 3, 3), (1, 5, 5), (6,), (8,)))
    builder = Builder(torch.rand(1, *shape))
    wanted = rng.randint(1, 7)
    false = rng.randint(0, wanted) if seed % 5 == 0 else -1
    for attempt in range(60):
        if len(builder.steps) == wanted:
            break
        table = FALSE if len(builder.steps) == false and attempt < 50 else MOVES
        name = rng.choice(list(table))
        builder.try_move(name, table[name], rng)
    if rng.random() < 0.3:
        builder.try_move("view", MOVES["view"], rng)
        builder.try_move("head", _of_layer(lambda s, r: nn.Linear(s[-1], 3)), rng)
    return builder.graph(), builder.x, tuple(builder.names)


def judge(seed: int, falsify: bool = False) -> Verdict:
    """Bound a random graph and compare with Jacobians and pairs, in float64, of the model as it runs."""
    model, example, names = build(seed)
    try:
        bound = lipschitz_bound(model, example, falsify=falsify)
    except UnknownLipschitzError as error:
        return Verdict(names, str(error))
    except UnsoundError as error:
        found = error.counterexample is not None
        return Verdict(names, "" if found else str(error), 0.0, 1.0 if found else math.nan)
    norm = largest_ratio(model, example, seed)
    return Verdict(names, "", float(bound), norm, misuse(model, example, bound))


def largest_ratio(model: nn.Module, example: Tensor, seed: int) -> float:
    """Return the largest Jacobian norm, or ratio of the distances of a pair, at points of several scales."""
    generator = torch.Generator().manual_seed(seed)
    live = copy.deepcopy(model).eval().double().requires_grad_(False)
    noise = torch.randn(4, *example.shape[1:], generator=generator).double()
    scales = torch.tensor([0.01, 0.5, 3.0, 100.0]).double().view(-1, *(1 for _ in example.shape[1:]))
    points = torch.cat([example.double(), scales * noise, 5 * torch.ones_like(example).double()])
    worst = 0.0
    for x in points:
        jacobian = torch.autograd.functional.jacobian(lambda v: live(v[None])[0], x)
        worst = max(worst, float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)))
    with torch.no_grad():
        outputs = live(points).flatten(1)
    moved, distances = torch.cdist(outputs, outputs), torch.cdist(points.flatten(1), points.flatten(1))
    return max(worst, float((moved / distances.clamp_min(1e-9)).fill_diagonal_(0).max()))


def misuse(model: Graph, example: Tensor, bound: Any) -> str:
    """Return which call that must be refused was not: the kinds that are no graphs."""
    with torch.no_grad():
        scores = model(example)
    if scores.dim() != 2 or scores.shape[1] < 2 or bound.rounding.unknown or not float(bound):
        return ""
    y = scores.argmax(1)
    calls: dict[str, Callable[[], Any]] = {
        "6 no constant": lambda: certified_radius(scores, y),
        "5 whole bound": lambda: certified_radius(scores, y, bound, last_layer=torch.eye(scores.shape[1])),
    }
    if scores.abs().max() > 0 and not bool((scores == scores.round()).all()):
        half = scores.bfloat16().float()
        if not bool((half == half.round()).all()):
            calls["7 half precision"] = lambda: certified_radius(half, y, bound, inputs=example)
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError):
            continue
        return name
    return ""


def soundness(quick: bool, graphs: int = GRAPHS) -> list[Figure]:
    count = 60 if quick else graphs
    verdicts = [judge(seed, falsify=seed % 4 == 0) for seed in track(range(count), "Random graphs", transient=True)]
    accepted = [v for v in verdicts if not v.refused]
    unsound = [v for v in accepted if v.unsound]
    let_through = [v for v in accepted if any(name in FALSE for name in v.names)]
    ratios = [v.norm / v.bound for v in accepted if v.bound]
    note = "; ".join(f"{v.misused or v.names}: {v.norm:.6g} > {v.bound:.6g}" for v in unsound[:3])
    others = {", ".join(v.names) for v in let_through}
    return [
        Figure("random graphs with a false bound", "count", [len(unsound)], 0, note=note or f"{count} graphs"),
        Figure("once unsound and accepted", "count", [len(let_through)], note="; ".join(sorted(others)[:3])),
        Figure("random graphs accepted", "count", [len(accepted)]),
        Figure("norm / bound of random graphs", "ratio", ratios, by="max"),
    ]
