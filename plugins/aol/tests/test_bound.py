"""Bounds are never below the norm of the Jacobian, and what is unknown is refused with its path."""

import pytest
import torch
from aol_written import Apply
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from groundwire_aol import AOLConv2d, AOLLinear, MaxMin, UnknownLipschitzError, lipschitz_bound
from groundwire_aol.certify import norms as norms_module
from groundwire_aol.certify.attacks import max_jacobian_norm
from groundwire_aol.certify.norms import kernel_norm, matrix_norm, nonnegative_norm
from groundwire_aol.certify.operations import FUNCTIONS, LAYERS
from groundwire_aol.layers.rescale import Geometry

MODULES = {cls: entry.constant for cls, entry in LAYERS.items() if entry.constant is not None}
SLOPES = {name: entry.constant for name, entry in FUNCTIONS.items() if entry.constant is not None}


def conv(**options):
    torch.manual_seed(0)
    return nn.Conv2d(4, 4, 3, **{"padding": 1, **options})


def batchnorm():
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(4)
    layer.running_var.uniform_(0.1, 2)
    nn.init.normal_(layer.weight)
    return layer


def halves(parts):
    return torch.maximum(parts[0], parts[1])


KNOWN = {
    "convolution": lambda: nn.Sequential(conv()),
    "reflect": lambda: nn.Sequential(conv(padding_mode="reflect")),
    "replicate": lambda: nn.Sequential(conv(padding=2, padding_mode="replicate")),
    "wrapping twice": lambda: nn.Sequential(conv(padding=3, padding_mode="circular")),
    "strided": lambda: nn.Sequential(conv(stride=2, dilation=2)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(conv())),
    "batchnorm": lambda: nn.Sequential(conv(), batchnorm(), nn.GELU()),
    "pools": lambda: nn.Sequential(nn.MaxPool2d(3, 2), conv(), nn.AvgPool2d(2, 1)),
    "overlapping pool": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1)),
    "padding": lambda: nn.Sequential(nn.ReflectionPad2d(2), conv()),
    "upsampling": lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), conv()),
    "sum": lambda: Apply(lambda m, x: x + m.conv(x).relu(), conv=conv()),
    "difference": lambda: Apply(lambda m, x: 2 - (x - 3 * m.conv(x)) / 0.5, conv=conv()),
    "cat": lambda: Apply(lambda m, x: torch.cat([m.conv(x), x], dim=1), conv=conv()),
    "stack": lambda: Apply(lambda m, x: torch.stack([m.conv(x), -x], dim=1), conv=conv()),
    "broadcast sum": lambda: Apply(lambda m, x: x + m.conv(x).mean((2, 3), keepdim=True), conv=conv()),
    "chunks": lambda: Apply(lambda m, x: halves(m.conv(x).chunk(2, 1)), conv=conv()),
    "weights as functions": lambda: Apply(lambda m, x: F.conv2d(x, m.conv.weight, stride=2), conv=conv()),
    "adjoint": lambda: Apply(lambda m, x: F.conv_transpose2d(x, m.conv.weight, None, 2, 1), conv=conv()),
    "shapes": lambda: Apply(lambda m, x: x.view(x.size(0), -1).unsqueeze(2).expand(-1, -1, x.shape[1]).flatten(1)),
    "factors": lambda: Apply(lambda m, x: x * torch.tensor([1.0, -4.0, 2.0, 0.5]).view(4, 1, 1)),
    "slices": lambda: Apply(lambda m, x: F.pad(x[:, ::2], (1, 2, 0, 3), mode="circular").sum(2).amax(1)),
    "two outputs": lambda: Apply(lambda m, x: (m.conv(x), x), conv=conv()),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("side", [6, 17])
def test_no_bound_is_below_the_norm_of_the_jacobian(name, side):
    module = KNOWN[name]().eval()
    bound = lipschitz_bound(module, torch.rand(1, 4, side, side))
    single = (
        Apply(lambda m, x: torch.cat([t.flatten(1) for t in m.inner(x)], 1), inner=module)
        if name == "two outputs"
        else module
    )
    x = torch.randn(1, 4, 6, 6) if side == 6 else torch.randn(1, 4, 17, 17)
    assert max_jacobian_norm(single, x) <= float(bound)
    assert float(bound) <= 12 * max_jacobian_norm(single, x)  # nor is it vacuous
    assert bound.value >= max(layer.lipschitz for layer in bound.layers[-1:])
    assert all(layer.proof for layer in bound.layers)


def test_an_aol_network_is_proved_to_be_1_lipschitz_from_its_rounded_weights():
    net = nn.Sequential(
        AOLConv2d(1, 8, 3, stride=2), MaxMin(), AOLConv2d(8, 8, 3, steps=2), MaxMin(), nn.Flatten(), AOLLinear(8 * 9, 5)
    )
    for seed in range(5):
        torch.manual_seed(seed)
        for p in net.parameters():
            p.data.normal_()
        bound = lipschitz_bound(net, torch.rand(1, 1, 11, 11))
        assert float(bound) == pytest.approx(1, abs=1e-5)
        assert max_jacobian_norm(net, torch.rand(2, 1, 11, 11)) <= float(bound)
        assert {b.proof for b in bound.layers if "AOL" in b.operation} == {"AOL, proved again in float64"}


def test_weights_tampered_with_behind_the_rescale_are_noticed():
    """The proof is of the weight as it is, not of what the rule should have made of it."""

    class Tenfold(nn.Module):
        def forward(self, w):
            return 10 * w

    layer = AOLLinear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Tenfold(), unsafe=True)
    assert float(lipschitz_bound(layer, torch.rand(1, 4))) == pytest.approx(10, rel=1e-4)


# Those of this package are tested with it; dropout is the identity in evaluation.
ELEMENTWISE = [
    cls for cls in MODULES
    if cls.__module__.startswith("torch") and not issubclass(cls, nn.modules.dropout._DropoutNd)
]  # fmt: skip


@pytest.mark.parametrize("layer", ELEMENTWISE, ids=lambda c: c.__name__)
def test_no_activation_is_steeper_than_its_constant(layer):
    x = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    values = layer()(x)
    steepest = float(((values[1:] - values[:-1]) / (x[1] - x[0])).abs().max())
    assert steepest <= MODULES[layer] * (1 + 1e-6)
    assert steepest > 0.99 * MODULES[layer]


def test_functions_have_the_constants_of_their_layers():
    layers = {cls.__name__.lower(): value for cls, value in MODULES.items()}
    shared = SLOPES.keys() & layers.keys()
    assert len(shared) > 8
    assert {name: SLOPES[name] for name in shared} == {name: layers[name] for name in shared}


REFUSED = {
    "layer norm": (lambda: nn.Sequential(conv(), nn.LayerNorm([4, 6, 6])), "1"),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4)), "0"),
    "softmax": (lambda: nn.Sequential(nn.Flatten(), nn.Softmax(1)), "1"),
    "attention": (lambda: Apply(lambda m, x: m.att(*[x.flatten(2)] * 3)[0], att=nn.MultiheadAttention(36, 1)), "att"),
    "batch statistics": (lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "0"),
    "product": (lambda: Apply(lambda m, x: x * torch.sigmoid(x)), "mul"),
    "quotient": (lambda: Apply(lambda m, x: 1 / (1 + x.abs())), "truediv"),
    "power": (lambda: Apply(lambda m, x: x**2), "pow"),
    "unit length": (lambda: Apply(lambda m, x: F.normalize(x)), "normalize"),
    "mean over the batch": (lambda: Apply(lambda m, x: x - x.mean(0)), "mean"),
    "reversed batch": (lambda: Apply(lambda m, x: x.flip(0)), "flip"),
    "running sum over the batch": (lambda: Apply(lambda m, x: x.cumsum(0)), "cumsum"),
    "batch in another place": (lambda: Apply(lambda m, x: x.transpose(0, 1)), "transpose"),
    "whole batch": (lambda: Apply(lambda m, x: x.max()), "max"),
    "indices": (lambda: Apply(lambda m, x: x.max(1)[1]), "getitem"),
    "random numbers": (lambda: Apply(lambda m, x: x + torch.rand(1)), "Apply"),
    "noise": (lambda: Apply(lambda m, x: x + torch.randn_like(x)), "randn_like"),
    "active dropout": (lambda: Apply(lambda m, x: F.dropout(x, 0.5)), "dropout"),
    "bicubic": (lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic")), "0"),
    "in place": (lambda: Apply(lambda m, x: (x.relu().mul_(5), x)[1]), "mul_"),
    "gelu in place": (lambda: Apply(lambda m, x: (F.silu(x, inplace=True), x)[1]), "silu"),
    "half": (lambda: Apply(lambda m, x: x.to(torch.float16)), "to"),
    "negative average": (lambda: Apply(lambda m, x: F.avg_pool2d(x, 2, divisor_override=-1)), "avg_pool2d"),
    "branch on values": (lambda: Apply(lambda m, x: x if x.sum() > 0 else 5 * x), "Apply"),
    "threshold": (lambda: nn.Sequential(nn.Threshold(0.5, 0.0)), "0"),
    "recurrent": (lambda: Apply(lambda m, x: m.rnn(x.flatten(2))[0], rnn=nn.LSTM(36, 4)), "rnn"),
    "own function": (lambda: Apply(lambda m, x: torch.fft.fft2(x).real), "fft_fft2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unknown_is_refused_with_its_path(name):
    make, path = REFUSED[name]
    with pytest.raises(UnknownLipschitzError) as raised:
        lipschitz_bound(make().eval(), torch.rand(2, 4, 6, 6))
    assert raised.value.path.split("_1")[0] == path or raised.value.path.startswith(path)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_the_scale_of_the_weights_is_no_reason_to_refuse(scale):
    layer = conv()
    layer.weight.data.mul_(scale)
    unit = float(lipschitz_bound(nn.Sequential(conv()), torch.rand(1, 4, 17, 17)))
    assert float(lipschitz_bound(nn.Sequential(layer), torch.rand(1, 4, 17, 17))) == pytest.approx(
        scale * unit, rel=1e-4
    )


def test_large_matrices_and_kernels_have_upper_bounds_that_are_close(monkeypatch):
    monkeypatch.setattr(norms_module, "MAX_COLUMNS", 4)
    matrix = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    bound, how = matrix_norm(matrix)
    assert "Gram" in how
    assert exact <= bound <= 1.1 * exact
    kernel = torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    true = max_jacobian_norm(Apply(lambda m, x: F.conv2d(x, kernel, padding=1)), torch.zeros(1, 3, 12, 12))
    assert true <= kernel_norm(kernel, Geometry((1, 1), (1, 1))) <= 1.2 * true


def test_the_schur_test_refuses_what_it_does_not_bound():
    for function in (lambda x: -x, lambda x: x.flip(0), lambda x: x[:1]):
        with pytest.raises(ValueError, match=r"negative|batch"):
            nonnegative_norm(function, (3,))
