"""A zoo of modules with nasty weights: whatever bound is accepted must not be below the norm from an SVD in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from aol_rows import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from groundwire_aol import (
    AOLConv1d,
    AOLConv2d,
    AOLConv3d,
    AOLConvTranspose2d,
    AOLLinear,
    BatchCentering,
    GroupSort,
    MaxMin,
    NActivation,
    UnknownLipschitzError,
    UnsoundError,
    lipschitz,
    lipschitz_bound,
)
from groundwire_aol.certify.attacks import max_jacobian_norm
from groundwire_aol.certify.plain_copy import plain_copy
from groundwire_aol.certify.rounding import Rounding
from groundwire_aol.layers.rescale import Geometry, rescale

KERNELS = 13
#: Inputs whose float32 scores are compared with float64 ones.
SAMPLES = 200


@dataclass(frozen=True)
class Entry:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def fill(weight: Tensor, kind: int) -> None:
    """One of the thirteen kernels."""
    g = torch.Generator().manual_seed(kind)
    noise = torch.randn(weight.shape, generator=g).to(weight)
    w = {
        5: torch.ones_like(weight),
        6: noise.abs(),
        7: torch.rand(weight.shape, generator=g).to(weight),
        8: torch.ones_like(weight) * (-1.0) ** torch.arange(weight.numel()).view(weight.shape).to(weight),
        9: torch.zeros_like(weight),
        10: 1e4 * noise,
        11: 1e-6 * noise,
        12: noise.clone(),
    }.get(kind, noise)
    if kind == 9:
        w.view(-1)[:: max(1, weight.numel() // 4)] = 1.0
    if kind == 12:
        w[:, 0] = 0.0
    weight.data.copy_(w)


def randomise(module: nn.Module, kind: int) -> nn.Module:
    """Every weight of more than one dimension becomes kernel ``kind``; statistics and factors become uneven."""
    torch.manual_seed(kind)
    for parameter in module.parameters():
        fill(parameter, kind) if parameter.dim() > 1 else nn.init.normal_(parameter)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.05, 2.0)
    return module.eval()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.combine = inner, combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.inner(x))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def zoo() -> list[Entry]:
    entries = []

    def add(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...] = (4, 6, 6)) -> None:
        entries.append(Entry(name, make, shape))

    for rows, columns in ((6, 6), (3, 9), (9, 3)):
        for steps in (1, 2):
            add(
                f"AOLLinear {columns}->{rows} steps {steps}",
                lambda r=rows, c=columns, s=steps: AOLLinear(c, r, steps=s),
                (columns,),
            )
    for k, s, p, d in ((1, 1, 0, 1), (3, 1, 0, 1), (3, 1, 1, 1), (3, 1, 2, 1), (5, 1, 2, 1), (2, 1, 1, 1), (3, 2, 1,
    1), (3, 2, 0, 1),
                       (2, 2, 0, 1), (3, 3, 1, 1), (3, 1, 2, 2), (3, 2, 2, 2), (3, 2, 3, 3), (3, 3, 2, 2), (4, 2, 1,
                       1), (1, 2, 0, 1)):  # fmt: skip
        add(f"AOLConv2d k{k} s{s} p{p} d{d}", lambda k=k, s=s, p=p, d=d: AOLConv2d(4, 6, k, s, p, d))
    for options in ({"groups": 2}, {"groups": 4, "stride": 2}, {"steps": 2}, {"steps": 2, "stride": 2}, {"compat":
    "reference"},
                    {"compat": "reference", "stride": 2}, {"side": "in"}, {"side": "out", "stride": 2}):  # fmt: skip
        add(f"AOLConv2d k3 {options}", lambda o=options: AOLConv2d(4, 8, 3, padding=1, **o))
    for k, s, p, d in ((3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 2, 1), (3, 1, 2, 2), (3, 1, "same", 1), (2, 1, "same", 1)):
        add(
            f"AOLConv2d circular k{k} s{s} p{p} d{d}",
            lambda k=k, s=s, p=p, d=d: AOLConv2d(4, 4, k, s, p, d, padding_mode="circular"),
            (4, 7, 7),
        )
    add("AOLConv2d reflect", lambda: AOLConv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    add("AOLConv2d replicate", lambda: AOLConv2d(4, 4, 3, padding=1, padding_mode="replicate"))
    add("AOLConv2d circular, twice", lambda: AOLConv2d(4, 4, 3, padding=2, padding_mode="circular"))
    add("AOLConv2d circular 1x1, twice", lambda: AOLConv2d(4, 4, 1, padding=1, padding_mode="circular"))
    add("AOLConv1d k3 s2", lambda: AOLConv1d(4, 6, 3, 2, 1), (4, 9))
    add("AOLConv1d k5 d2", lambda: AOLConv1d(4, 4, 5, padding=4, dilation=2), (4, 9))
    add("AOLConv3d k3", lambda: AOLConv3d(2, 3, 3, padding=1), (2, 4, 4, 4))
    add("AOLConv3d k2 s2", lambda: AOLConv3d(2, 4, 2, 2), (2, 4, 4, 4))
    for k, s, p, o, g in ((3, 1, 1, 0, 1), (3, 2, 1, 1, 1), (2, 2, 0, 0, 1), (4, 2, 1, 0, 2), (3, 3, 0, 1, 1)):
        add(
            f"AOLConvTranspose2d k{k} s{s}",
            lambda k=k, s=s, p=p, o=o, g=g: AOLConvTranspose2d(4, 6, k, s, p, o, g),
            (4, 4, 4),
        )
    conv = lambda **o: AOLConv2d(4, 4, 3, padding=1, **o)  # noqa: E731
    add(
        "chain with MaxMin",
        lambda: nn.Sequential(conv(), MaxMin(), conv(stride=2), MaxMin("halves"), nn.Flatten(), AOLLinear(36, 5)),
    )
    add("chain with GroupSort", lambda: nn.Sequential(conv(), GroupSort(4), conv(), GroupSort(None)))
    add("chain with NActivation", lambda: nn.Sequential(conv(), NActivation(4), conv(), NActivation(4, "log_uniform")))
    add("BatchCentering", lambda: nn.Sequential(conv(), BatchCentering(4), conv()))
    add("residual sum", lambda: Residual(nn.Sequential(conv(), nn.ReLU()), torch.add))
    add("residual difference", lambda: Residual(conv(), torch.sub))
    add("concatenation", lambda: Residual(conv(), lambda x, y: torch.cat([x, y], 1)))
    add("maximum", lambda: Residual(conv(), torch.maximum))
    add("product of activations", lambda: Residual(conv(), torch.mul))
    add("plain Conv2d", lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)))
    add("plain Conv2d, large", lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)), (4, 17, 17))
    add("plain Conv2d reflect", lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")))
    add(
        "plain Conv2d reflect, large",
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=2, padding_mode="reflect")),
        (4, 17, 17),
    )
    add(
        "plain Conv2d replicate, large",
        lambda: nn.Sequential(nn.Conv2d(4, 2, 3, padding=2, padding_mode="replicate")),
        (4, 17, 17),
    )
    add(
        "plain Conv2d circular, large",
        lambda: nn.Sequential(nn.Conv2d(4, 2, 3, padding=2, padding_mode="circular")),
        (4, 17, 17),
    )
    add("plain ConvTranspose2d", lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2, 1)))
    add(
        "spectral_norm Conv2d",
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))),
    )
    add("weight_norm Linear", lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))), (6,))
    add("BatchNorm", lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()))
    add("BatchNorm of the batch", lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)))
    add("LayerNorm", lambda: nn.Sequential(nn.LayerNorm([4, 6, 6])))
    for k, s, p in ((2, 2, 0), (3, 2, 1), (3, 1, 1)):
        add(f"MaxPool2d {k}/{s}", lambda k=k, s=s, p=p: nn.Sequential(nn.MaxPool2d(k, s, p)))
        add(f"AvgPool2d {k}/{s}", lambda k=k, s=s, p=p: nn.Sequential(nn.AvgPool2d(k, s, p)))
    add("AdaptiveAvgPool2d", lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4)))
    add("Upsample nearest", lambda: nn.Sequential(nn.Upsample(scale_factor=2)))
    add("Upsample bilinear", lambda: nn.Sequential(nn.Upsample(scale_factor=3, mode="bilinear")))
    add("Upsample bicubic", lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic")))
    add("ReplicationPad2d", lambda: nn.Sequential(nn.ReplicationPad2d(2)))
    add("ReflectionPad2d", lambda: nn.Sequential(nn.ReflectionPad2d(3)))
    add("F.pad circular", lambda: Apply(lambda x: F.pad(x, (3, 3, 2, 2), mode="circular")))
    for activation in (
        nn.GELU(),
        nn.SiLU(),
        nn.Mish(),
        nn.SELU(),
        nn.Hardswish(),
        nn.PReLU(4),
        nn.Softplus(3.0),
        nn.ELU(2.0),
        nn.Sigmoid(),
    ):
        add(f"{type(activation).__name__}", lambda a=activation: nn.Sequential(copy.deepcopy(a)), (4, 2, 2))
    add(
        "mean and multiply",
        lambda: Apply(lambda x: 3.0 * x.mean(1) - x.sum(2)[:, :, :1].flatten(1).mean(1)[:, None, None]),
    )
    add("expand and add", lambda: Apply(lambda x: x + x.mean((2, 3), keepdim=True)))
    add("x / norm", lambda: Apply(lambda x: x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)))
    add("softmax", lambda: nn.Sequential(nn.Softmax(1)))
    add("statistics of the batch", lambda: Apply(lambda x: x - 2 * x.mean(0, keepdim=True)))
    add("converted stock CNN", lambda: lipschitz(nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))[0])  # fmt: skip
    return entries


def audit(entry: Entry, kind: int) -> tuple[str, float, float, float | None]:
    """("refused", ...), or ("accepted", bound, largest norm of a Jacobian, largest rounding error over its bound)."""
    try:
        module = randomise(entry.make(), kind)
        bound = lipschitz_bound(module, torch.rand(1, *entry.shape))
    except (UnsoundError, UnknownLipschitzError):
        return "refused", 0.0, 0.0, None
    generator = torch.Generator().manual_seed(kind)
    points = torch.cat(
        [torch.randn(2, *entry.shape, generator=generator), 3 * torch.rand(1, *entry.shape, generator=generator)]
    )
    rounding = None if bound.rounding.unknown else rounded(module, bound.rounding, entry.shape, generator)
    return "accepted", float(bound), max_jacobian_norm(module, points), rounding


def rounded(module: nn.Module, rounding: Rounding, shape: tuple[int, ...], generator: torch.Generator) -> float:
    """Largest distance of float32 scores from float64 ones, as a share of what was proved, on inputs of all sizes."""
    sizes = torch.tensor([1e-6, 1e-3, 1.0, 1e2, 1e4]).repeat_interleave(SAMPLES // 5).view(-1, *(1 for _ in shape))
    x = torch.randn(len(sizes), *shape, generator=generator) * sizes
    plain = plain_copy(module)
    with torch.no_grad():
        scores, exact = plain(x).double(), copy.deepcopy(plain).double()(x.double())
    error = (scores - exact).flatten(1).norm(dim=1)
    return float((error / rounding.error(x.double().flatten(1).norm(dim=1))).max())


def soundness(quick: bool) -> list[Figure]:
    entries, kinds = zoo(), range(0, KERNELS, 6 if quick else 1)
    unsound, accepted, refused, ratios, roundings, worst = 0, 0, set(), [], [], ""
    warnings.filterwarnings("ignore", message=".*padding='same'.*")
    for entry in track(entries, "The zoo", transient=True):
        for kind in kinds:
            verdict, bound, norm, rounding = audit(entry, kind)
            if verdict == "refused":
                refused.add(entry.name)
                continue
            accepted += 1
            ratios.append(norm / bound if bound else float(norm > 0))
            roundings += [] if rounding is None else [rounding]
            if norm > bound * (1 + 1e-9):
                unsound, worst = unsound + 1, f"{entry.name}, kernel {kind}: {norm:.6g} > {bound:.6g}"
    note = worst or f"{len(entries)} modules x {len(kinds)} kernels; refused: {', '.join(sorted(refused))}"
    return [
        Figure("unsound accepts over the zoo", "count", [unsound], 0, note=note),
        Figure("norm / bound of what was accepted", "ratio", ratios, by="max"),
        Figure("accepted", "modules x kernels", [accepted]),
        Figure("rounding errors above their bound", "count", [sum(not r <= 1 for r in roundings)], 0),
        Figure("rounding error / bound", "ratio", roundings, note=f"{len(roundings)} x {SAMPLES} inputs in float32"),
    ]


def peers(quick: bool) -> list[Figure]:
    """The largest norm that 20 steps of gradient ascent on the output's energy reach, where 1 is promised."""
    from deel import torchlip
    from orthogonium.layers.conv.AOL.aol import AOLConv2D

    makers = {
        "AOL here": lambda s: AOLConv2d(8, 8, 3, s, 1),
        "torch spectral_norm": lambda s: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, s, 1)),
        "orthogonium AOL": lambda s: AOLConv2D(8, 8, 3, stride=s, padding=1),
        "torchlip SpectralConv2d": lambda s: torchlip.SpectralConv2d(8, 8, 3, stride=s, padding=1),
    }
    figures = []
    for name, make in makers.items():
        for stride in (1, 2):
            norms = [ascend(make, stride, seed) for seed in range(1 if quick else 3)]
            target = 1 + 1e-6 if name == "AOL here" else None
            figures.append(Figure(f"norm after ascent, stride {stride}: {name}", "sigma_max", norms, target, by="max"))
    return figures


def ascend(make: Callable[[int], nn.Module], stride: int, seed: int) -> float:
    torch.manual_seed(seed)
    layer = make(stride)
    x = torch.randn(16, 8, 8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (-(layer(x).square().sum() / x.square().sum())).backward()
        optimizer.step()
    layer.eval()
    basis = torch.eye(512).view(512, 8, 8, 8)
    with torch.no_grad():
        columns = (layer(basis) - layer(torch.zeros(1, 8, 8, 8))).flatten(1).double()
    return float(torch.linalg.svdvals(columns)[0])


def strided(quick: bool) -> list[Figure]:
    """A 3 x 3 kernel, stride 2, 4 to 8 channels."""
    norms, gains = [], []
    for seed in track(range(10 if quick else 60), "Strided kernels", transient=True):
        weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        energies = []
        for compat in (None, "reference"):
            scaled = rescale(weight, Geometry((2, 2), (1, 1)), compat=compat)
            basis = torch.eye(256, dtype=torch.float64).view(256, 4, 8, 8)
            values = torch.linalg.svdvals(F.conv2d(basis, scaled, stride=2, padding=1).flatten(1))
            energies.append(float(values.square().sum()))
            if compat is None:
                norms.append(float(values[0]))
        gains.append(energies[0] / energies[1])
    return [
        Figure("strided AOL k3 s2: sigma_max, mean", "sigma_max", norms, 0.69, True, "mean"),
        Figure("strided AOL k3 s2: sigma_max, smallest", "sigma_max", norms, 0.65, True, "min"),
        Figure("strided AOL k3 s2: energy over in-channel AOL", "ratio", gains, 2.0, True),
    ]
