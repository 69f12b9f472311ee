"""Kinds of models whose bound was once too small: each is refused, or has a bound that holds."""

import math

import pytest
import torch
from aol_written import Apply
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from groundwire_aol import BatchCentering, NActivation, UnknownLipschitzError, UnsoundError, lipschitz_bound
from groundwire_aol.certify.attacks import max_jacobian_norm

IMAGE = (2, 4, 4)
LIMIT = torch.linspace(-1, 1, 32).view(1, *IMAGE)


def mean(x):
    return x.mean((2, 3), keepdim=True)


COPIES = {
    "clamp": lambda m, x: torch.clamp(mean(x), min=LIMIT),
    "clip": lambda m, x: mean(x).clip(max=LIMIT),
    "clamp_min": lambda m, x: torch.clamp_min(mean(x), LIMIT),
    "clamp_max": lambda m, x: mean(x).clamp_max(LIMIT),
    "prelu": lambda m, x: F.prelu(x.mean(1, keepdim=True).expand(-1, 2, -1, -1)[:, :1], torch.ones(1)),
    "centering": lambda m, x: m.layer(x[:, :1]),
}


@pytest.mark.parametrize("name", ["clamp", "clip", "clamp_min", "clamp_max"])
def test_a_limit_that_broadcasts_is_refused(name):
    with pytest.raises(UnknownLipschitzError, match="copies or drops entries"):
        lipschitz_bound(Apply(COPIES[name]), torch.rand(1, *IMAGE))


def test_limits_of_the_full_shape_are_fine():
    model = Apply(lambda m, x: torch.clamp(x, min=LIMIT))
    assert float(lipschitz_bound(model, torch.rand(1, *IMAGE))) == 1


@pytest.mark.parametrize("layer", [BatchCentering(64), NActivation(64)])
def test_layers_of_another_number_of_channels_are_errors(layer):
    with pytest.raises(ValueError, match="got an input of shape"):
        layer.eval()(torch.rand(2, 1, 4, 4))
    with pytest.raises(UnsoundError, match="cannot take"):
        lipschitz_bound(nn.Sequential(layer), torch.rand(1, 1, 4, 4))


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


class DropConnect(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.5)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * min(self.calls, 100)


class LateCounter(Counter):
    """Changes its weight long after it was looked at."""

    def forward(self, weight):
        self.calls += 1
        return weight * (1 if self.calls < 10_000 else 10)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        return weight * (1 if self.calls < 10_000 else 10)


@pytest.mark.parametrize("kind", [Noise, DropConnect, Counter, LateCounter, Buffered])
def test_random_and_counting_parametrizations_are_refused(kind):
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", kind())
    with pytest.raises(UnknownLipschitzError, match=r"each time|every forward pass|was traced|its batch"):
        lipschitz_bound(nn.Sequential(layer, nn.ReLU()), torch.rand(1, 6))


def test_softplus_in_float64_jumps_at_its_threshold_by_less_than_the_bound_of_rounding():
    layer = nn.Softplus()
    x = torch.full((1, 3), 20.0, dtype=torch.float64)
    above = x.nextafter(torch.tensor(math.inf, dtype=torch.float64))
    jump = (layer(x) - layer(above)).norm()
    assert jump > 1e-9
    proved = lipschitz_bound(nn.Sequential(layer), x).rounding
    assert jump <= 2 * proved.error(float(x.norm())) + 1e-12


def test_hooks_of_all_modules_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: 5 * output)
    try:
        with pytest.raises(UnknownLipschitzError, match="hook of all modules"):
            lipschitz_bound(nn.Sequential(nn.Linear(3, 3)), torch.rand(1, 3))
    finally:
        handle.remove()


@pytest.mark.parametrize("place", [(nn.ReLU, "forward"), (nn.Conv2d, "_conv_forward"), (F, "relu"), (F, "linear")])
def test_patches_of_torch_are_refused(place, monkeypatch):
    original = getattr(*place)
    monkeypatch.setattr(*place, lambda *args, **kwargs: 5 * original(*args, **kwargs))
    with pytest.raises(UnknownLipschitzError, match="replaced"):
        lipschitz_bound(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.rand(1, 1, 5, 5))


def test_a_patched_method_of_tensors_is_refused(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tanh", lambda x: 5 * x)
    with pytest.raises(UnknownLipschitzError, match="no function of torch"):
        lipschitz_bound(Apply(lambda m, x: x.tanh()), torch.rand(1, 3))


def test_a_model_that_asks_whether_gradients_are_computed_is_refused():
    model = Apply(lambda m, x: 5 * x if torch.is_grad_enabled() else x)
    with pytest.raises(UnknownLipschitzError, match="gradients"):
        lipschitz_bound(model, torch.rand(1, 3))


def test_an_argument_that_another_call_may_change_is_refused():
    class Scaled(nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    class Unused(nn.Module):
        def forward(self, x, scale=1.0):
            return 2 * x

    with pytest.raises(UnknownLipschitzError, match="argument scale"):
        lipschitz_bound(Scaled(), torch.rand(1, 3))
    assert float(lipschitz_bound(Unused(), torch.rand(1, 3))) == pytest.approx(2, rel=1e-5)


BATCHES = {
    "factor": lambda m, x: x * x.shape[0],
    "comparison": lambda m, x: x * (1 + 4 * (x.shape[0] > 100)),
    "size": lambda m, x: x * (x.size(0) // 64 + 1),
    "entries": lambda m, x: x / x.numel(),
    "length of ones": lambda m, x: x * torch.ones_like(x).sum(),
    "range": lambda m, x: x + torch.arange(x.shape[0]).view(-1, 1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_numbers_of_the_batchs_size_are_refused(name):
    with pytest.raises(UnknownLipschitzError):
        lipschitz_bound(Apply(BATCHES[name]), torch.rand(1, 3))


def test_sizes_of_one_sample_and_shapes_of_the_batch_are_fine():
    def forward(m, x):
        b, c = x.shape
        padded = torch.cat([x, x.new_zeros(b, 2)], 1)
        return padded.view(b, c + 2) / c + torch.ones_like(x[:, :1])

    assert float(lipschitz_bound(Apply(forward), torch.rand(1, 4))) == pytest.approx(0.25, rel=1e-5)


def test_batchnorm_that_stays_in_training_mode_is_refused_with_the_cause():
    class Stubborn(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    with pytest.raises(UnknownLipschitzError, match="stays in training mode"):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3), Stubborn(3)), torch.rand(1, 3))


def test_what_copies_by_a_rule_has_a_bound_that_holds():
    model = Apply(lambda m, x: mean(x) + LIMIT)
    bound = float(lipschitz_bound(model, torch.rand(1, *IMAGE)))
    assert max_jacobian_norm(model, torch.rand(2, *IMAGE)) <= bound <= 1 + 1e-6


# What was refused although it is easy


class Parametrised(nn.Module):
    """A forward with a weight of its own."""

    def __init__(self, function, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.w = function, nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return self.function(x, self.w)


MASK = (torch.arange(32) % 3 == 0).view(IMAGE)
EASY = {
    "normalized head": (lambda x, w: F.linear(x.flatten(1), F.normalize(w, dim=1)), (3, 32)),
    "transposed weight": (lambda x, w: x.flatten(1) @ w.t(), (3, 32)),
    "norm of a weight": (lambda x, w: F.linear(x.flatten(1), w) / torch.linalg.norm(w), (3, 32)),
    "values of max": (lambda x, w: x.max(1).values * w, (1, 4, 4)),
    "values of sort": (lambda x, w: x.sort(2, descending=True).values * w, (1, 1, 4, 4)),
    "topk": (lambda x, w: x.flatten(1).topk(5).values * w, (1, 5)),
    "mean without out": (lambda x, w: torch.mean(x, 1, out=None) * w, (1, 4, 4)),
    "where": (lambda x, w: torch.where(MASK, x, 3 * x.relu()) * w, (1, 1, 1, 1)),
    "where broadcasts": (lambda x, w: torch.where(MASK, x[:, :1], w), (1, 1, 1, 1)),
    "einsum": (lambda x, w: torch.einsum("bchw,cd->bdhw", x, w), (2, 5)),
    "adaptive max pool": (lambda x, w: F.adaptive_max_pool2d(x, 3) * w, (1, 1, 1, 1)),
    "batch_norm": (lambda x, w: F.batch_norm(x, w[0].detach(), w[1].exp().detach(), w[2], w[3]), (4, 2)),
}


@pytest.mark.parametrize("name", EASY)
def test_easy_operations_have_bounds_that_hold_and_are_not_vacuous(name):
    model = Parametrised(*EASY[name])
    x = torch.randn(3, *IMAGE, generator=torch.Generator().manual_seed(0))
    bound = float(lipschitz_bound(model, x))
    found = max_jacobian_norm(model, x)
    assert found <= bound * (1 + 1e-6)
    assert bound <= 4 * found


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.where(x > 0, x, 5 + x),
        lambda x, w: torch.einsum("bchw,bdhw->bcd", x, x),
        lambda x, w: torch.einsum("bchw,bd->dchw", x, w[:, :2]),
        lambda x, w: F.batch_norm(x, None, None, None, None, True),
        lambda x, w: x.max(1).indices,
        lambda x, w: x.t() if x.dim else x,
    ],
)
def test_their_relatives_without_a_bound_are_refused(function):
    with pytest.raises((UnknownLipschitzError, UnsoundError)):
        lipschitz_bound(Parametrised(function, 2, 32), torch.rand(1, *IMAGE))


def test_gather_with_constant_indices_counts_copies():
    class Gather(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("index", torch.tensor([[3, 3, 1]]))

        def forward(self, x):
            return x.gather(1, self.index.expand(x.shape[0], 3))

    assert float(lipschitz_bound(Gather(), torch.rand(1, 5))) == pytest.approx(2**0.5, rel=1e-6)


def test_adaptive_max_pools_count_windows_that_overlap():
    for size, outputs in ((7, 3), (4, 3), (6, 3), (5, 5), (3, 7)):
        bound = float(lipschitz_bound(nn.Sequential(nn.AdaptiveMaxPool1d(outputs)), torch.rand(1, 2, size)))
        points = torch.eye(size).repeat(2, 1, 1).transpose(0, 1)
        assert max_jacobian_norm(nn.Sequential(nn.AdaptiveMaxPool1d(outputs)), points) == pytest.approx(bound, rel=1e-6)
