"""The computed scores are never further from exact ones than was proved."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from groundwire_aol import (
    AOLConv2d,
    AOLLinear,
    BatchCentering,
    CertifiedAccuracy,
    CertifiedRadius,
    GroupSort,
    MaxMin,
    NActivation,
    UnsoundError,
    audit_bound,
    certified_radius,
    lipschitz,
    lipschitz_bound,
)
from groundwire_aol.certify import rounding as rounding_module
from groundwire_aol.certify.operations import OPERATIONS
from groundwire_aol.certify.plain_copy import plain_copy
from groundwire_aol.certify.rounding import Rounding, not_standard
from groundwire_aol.certify.rounding_rules import approximate, softplus
from groundwire_aol.layers.pooling import GlobalAvgPool, Rescaled
from groundwire_aol.layers.residual import ConvexSum, ScaledConcat

#: Some radii here are of exact arithmetic, by intention.
pytestmark = pytest.mark.filterwarnings("ignore:certified radii are of exact arithmetic")
APPROXIMATE_LAYERS = [
    layer for entry in OPERATIONS if entry.rounding in (approximate, softplus) for layer in entry.layers
]


class Apply(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def conv(**options):
    return nn.Conv2d(4, 4, 3, **{"padding": 1, **options})


NETWORKS = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 32), MaxMin(), nn.Linear(32, 5)),
    "converted": lambda: lipschitz(nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 1), nn.Conv2d(8, 8, 2, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))[0],
    "aol": lambda: nn.Sequential(AOLConv2d(4, 8, 3, 2, 1), NActivation(8, "log_uniform"), BatchCentering(8),
                                 GroupSort(4), nn.PixelShuffle(2), nn.Flatten(), AOLLinear(72, 3)),
    "residual": lambda: Apply(lambda x, f, s, g: g(s(x, f(x).relu()) - 0.1 * x), conv(), ConvexSum(), conv(groups=2)),
    "branches": lambda: Apply(
        lambda x, f, c: torch.cat([f(x), c([x, -x])], 1), conv(dilation=2, padding=2), ScaledConcat()),
    "extremes": lambda: Apply(lambda x, f: torch.maximum(x, f(x)).amax(2) / 3, conv(padding_mode="reflect")),
    "averages": lambda: Apply(lambda x, p: F.avg_pool2d(p(x), 2, 1).mean(1).cumsum(1), Rescaled(nn.AvgPool2d(2), 2)),
    "global": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU(), GlobalAvgPool(2), nn.LeakyReLU(0.3)),
    "functions": lambda: Apply(lambda x, f:
        F.conv2d(F.pad(x, (1, 0, 2, 0)), f.weight, f.bias, 2) @ f.weight.flatten(1)[:3, :2], conv()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2, 1), nn.Sigmoid(), nn.Upsample(scale_factor=2)),
}  # fmt: skip


def randomised(name, seed, scale):
    torch.manual_seed(seed)
    net = NETWORKS[name]()
    for p in net.parameters():
        p.data.normal_().mul_(scale)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | BatchCentering):
            layer.running_mean.normal_()
    return net.eval()


def errors(net, x):
    """Distances of float32 outputs from float64 ones of the same weights, one per sample."""
    net = plain_copy(net)
    with torch.no_grad():
        return (net(x).double() - copy.deepcopy(net).double()(x.double())).flatten(1).norm(dim=1)


def norms(x):
    return x.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", NETWORKS)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 0.3, 30.0]), size=st.sampled_from([1e-5, 1.0, 1e4]))
@settings(max_examples=8, deadline=None)
def test_float32_outputs_stay_within_the_bound_of_float64_ones(name, seed, scale, size):
    net = randomised(name, seed, scale)
    x = torch.cat([torch.randn(32, 4, 6, 6), torch.rand(32, 4, 6, 6)]) * size
    bound = lipschitz_bound(net, x)
    assert bound.rounding.unknown == ""
    assert (errors(net, x) <= bound.rounding.error(norms(x))).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_the_bound_holds_for_every_order_of_summation_and_is_nearly_reached(backwards):
    """A sum that loses half a unit at every step, added up one by one."""
    layer = nn.Linear(2001, 1, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.full((1, 2001), 2.0**-24 * 1.0)
    x[0, 0] = 1.0
    terms = x[0].flip(0) if backwards else x[0]
    total = torch.zeros(())
    for term in terms:
        total = total + term
    error = abs(float(total) - float(x.double().sum()))
    proved = lipschitz_bound(layer, x).rounding.error(norms(x))[0]
    assert error <= proved
    # The norm of the row is sqrt(2001), of which this input uses 1.
    assert backwards or error > proved / 60


def test_zero_weights_add_no_terms():
    dense, sparse = nn.Linear(1000, 1), nn.Linear(1000, 1)
    dense.weight.data.fill_(1000**-0.5)
    sparse.weight.data.zero_()[0, :2] = 0.5**0.5
    x = torch.zeros(1, 1000)
    assert lipschitz_bound(sparse, x).rounding.slope < 0.05 * lipschitz_bound(dense, x).rounding.slope


@pytest.mark.parametrize("layer", APPROXIMATE_LAYERS, ids=lambda c: c.__name__)
def test_functions_that_no_standard_fixes_are_as_exact_as_is_assumed(layer):
    bits = torch.arange(-(2**31), 2**31, 2003).to(torch.int32).view(torch.float32)
    x = bits[bits.abs() < 1e35]
    net = layer()
    error = (net(x).double() - net(x.double())).abs()
    assert (error <= 16 * 2.0**-24 * x.double().abs().clamp_min(1)).all()


def test_a_float64_model_has_the_bound_of_float64():
    net = randomised("dense", 0, 1.0)
    x = torch.rand(1, 4, 6, 6)
    single, double = lipschitz_bound(net, x).rounding, lipschitz_bound(net.double(), x.double()).rounding
    assert double.slope == pytest.approx(single.slope * 2.0**-29, rel=1e-2)


def test_what_has_no_rule_is_said_and_refused():
    net = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    bound = lipschitz_bound(net, x)
    assert bound.rounding.unknown.startswith("0 ")
    assert bound.rounding.error(0.0) == math.inf
    assert "no bound" in str(bound)
    with pytest.raises(UnsoundError, match=r"0 .* no rule"):
        certified_radius(net(x).detach(), y, bound, inputs=x)
    assert certified_radius(net(x).detach(), y, bound).shape == (2,)


def test_a_layer_of_zeros_in_a_branch_leaves_a_bound():
    net = Apply(lambda x, f: x + f(x), nn.Linear(4, 4))
    nn.init.zeros_(net.layers[0].weight)
    x = torch.rand(5, 4)
    assert (errors(net, x) <= lipschitz_bound(net, x).rounding.error(norms(x))).all()
    assert lipschitz_bound(net, x).rounding.error(1.0) < 1e-5


def test_beyond_the_range_of_float32_nothing_is_proved():
    bound = lipschitz_bound(nn.Linear(4, 2), torch.rand(1, 4))
    assert math.isfinite(bound.rounding.error(1e30))
    assert bound.rounding.error(1e38) == math.inf


# Certificates


def test_the_radius_covers_the_error_here_and_within_it():
    bound = lipschitz_bound(randomised("dense", 0, 1.0), torch.rand(1, 4, 6, 6))
    x, logits = torch.rand(6, 4, 6, 6), torch.randn(6, 5) * 1000
    y = logits.argmax(1)
    found = certified_radius(logits, y, bound, inputs=x, input_std=0.5)
    for i in range(6):
        margin = float(logits[i, y[i]] - logits[i].topk(2).values[1])
        r = float(found[i])
        left = margin - math.sqrt(2) * (
            bound.rounding.error(float(norms(x)[i])) + bound.rounding.error(float(norms(x)[i]) + r / 0.5)
        )
        assert left == pytest.approx(math.sqrt(2) * float(bound) * r / 0.5, rel=1e-6)


def test_a_lead_that_only_rounding_made_is_not_certified():
    """Exact scores tie; computed ones do not."""
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0**-24, 2.0**-24], [1.0 + 2.0**-23, 0.0, 0.0]]))
    x, y = torch.ones(1, 3), torch.tensor([1])
    sequential = torch.tensor([[(1.0 + 2.0**-24) - 1.0 + 1.0, 1.0 + 2.0**-23]], dtype=torch.float32)
    scores = torch.stack([(x[0] * w).cumsum(0)[-1] for w in layer.weight.detach()])[None]
    assert scores.shape == sequential.shape
    bound = lipschitz_bound(layer, x)
    assert certified_radius(sequential, y, bound) > 0
    assert certified_radius(sequential, y, bound, inputs=x) == 0


def test_the_metrics_take_inputs():
    net = randomised("dense", 0, 1.0)
    x, y = torch.rand(20, 4, 6, 6), torch.randint(5, (20,))
    logits, bound = net(x).detach(), lipschitz_bound(net, x)
    radii = certified_radius(logits, y, bound, inputs=x)
    accuracy, radius = CertifiedAccuracy((0.0,), bound), CertifiedRadius(bound)
    accuracy.update(logits, y, x)
    radius.update(logits, y, x)
    assert accuracy.compute() == (radii > 0).float().mean()
    assert radius.compute() == pytest.approx(float(radii.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"lipschitz": 1.0}, "needs the bound of the whole model"),
        ({"inputs": torch.rand(2, 3)}, "of shape"),
        ({"inputs": torch.rand(2, 4, dtype=torch.float64)}, "autocast"),
        ({"last_layer": torch.rand(2, 4)}, "last_layer="),
    ],
)
def test_inputs_that_do_not_belong_to_the_scores_are_refused(wrong, match):
    net, x = nn.Linear(4, 2), torch.rand(2, 4)
    given_ = {"lipschitz": lipschitz_bound(net, x), "inputs": x, **wrong}
    with pytest.raises(ValueError, match=match):
        certified_radius(net(x).detach(), torch.tensor([0, 1]), given_.pop("lipschitz"), **given_)


def test_machines_and_settings_whose_sums_are_not_plain_are_refused(monkeypatch):
    assert not_standard("cpu") == ""
    assert "TF32" in not_standard("cuda")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert "fewer bits" in not_standard("cpu")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    monkeypatch.setattr(rounding_module.platform, "machine", lambda: "aarch64")
    assert "Winograd" in not_standard("cpu")


def test_without_onednn_winograd_cannot_be_excluded():
    torch.backends.mkldnn.enabled = False
    try:
        assert "Winograd" in not_standard("cpu")
    finally:
        torch.backends.mkldnn.enabled = True


def test_a_lower_precision_of_products_is_noticed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "fewer bits" in not_standard("cpu")
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_audit_compares_rounding_with_its_bound():
    net = randomised("dense", 0, 0.1)
    x = torch.rand(30, 4, 6, 6)
    data = [(x, net(x).argmax(1))]
    audit = audit_bound(net, data)
    assert 0 < audit.rounding <= audit.rounding_bound < 1e-3
    assert audit.sound
    bound = lipschitz_bound(net, x)
    false = copy.copy(bound)
    object.__setattr__(false, "rounding", Rounding(0.0, 0.0, (0.0, 1.0), torch.float32))
    assert not audit_bound(net, data, attack=False, bound=false).sound
