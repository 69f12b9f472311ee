"""The layers as drop-ins for torch.nn: settings, caching, checkpoints, precision, copies."""

import copy

import aol_operators as operators
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from groundwire_aol import (
    AOLConv1d,
    AOLConv2d,
    AOLConv3d,
    AOLConvTranspose2d,
    AOLLinear,
    BatchCentering,
    NActivation,
    UnsoundError,
    bake,
    constrain,
)
from groundwire_aol.layers.parametrization import aol_of

LAYERS = [
    (lambda **o: AOLLinear(6, 9, **o), (6,)),
    (lambda **o: AOLConv1d(4, 6, 3, stride=2, padding=1, **o), (4, 9)),
    (lambda **o: AOLConv2d(4, 4, 3, padding="same", **o), (4, 6, 6)),
    (lambda **o: AOLConv2d(4, 8, 3, stride=2, padding=1, groups=2, **o), (4, 6, 6)),
    (lambda **o: AOLConv2d(4, 4, 3, padding=2, dilation=2, padding_mode="circular", **o), (4, 6, 6)),
    (lambda **o: AOLConv3d(2, 3, 2, stride=2, **o), (2, 4, 4, 4)),
    (lambda **o: AOLConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, **o), (4, 4, 4)),
]
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS)


def randomised(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = layer.parametrizations.weight.original
    raw.data = torch.randn(raw.shape, generator=generator, dtype=raw.dtype)
    return layer


@every_layer
@pytest.mark.parametrize("steps", [1, 2])
def test_every_layer_has_norm_at_most_one(make, shape, steps):
    for seed in range(5):
        layer = randomised(make(steps=steps), seed).double()
        assert operators.largest(layer, shape) <= 1 + 1e-12


@every_layer
def test_every_layer_begins_with_norm_one(make, shape):
    assert 0.99 < operators.largest(make().double(), shape) <= 1


@every_layer
def test_the_baked_layer_is_plain_and_bit_equal(make, shape):
    layer = randomised(make()).eval()
    x = torch.rand(2, *shape)
    expected, plain = layer(x), bake(copy.deepcopy(layer))
    assert torch.equal(plain(x), expected)
    assert list(plain.state_dict()) == ["weight", "bias"]
    assert not plain._load_state_dict_pre_hooks
    assert torch.equal(layer(x), expected)  # the original still works


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"padding": 1, "padding_mode": "reflect"}, "1.068"),
        ({"padding": 1, "padding_mode": "replicate"}, "1.006"),
        ({"padding": 2, "padding_mode": "circular"}, "1.43"),
    ],
)
def test_unsound_paddings_are_refused_with_what_was_measured(options, reason):
    with pytest.raises(UnsoundError, match=reason):
        AOLConv2d(4, 4, 3, **options)


def test_training_never_meets_a_weight_without_gradient():
    layer = randomised(AOLLinear(4, 4))
    layer.eval()
    with torch.no_grad():
        layer(torch.rand(1, 4))
    for mode in (True, False):
        layer.train(mode)
        layer.zero_grad()
        layer(torch.rand(2, 4)).sum().backward()
        assert layer.parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.mul_(2.0).add_(0.1),
        lambda w: w.data.add_(0.5),
        lambda w: setattr(w, "data", torch.ones_like(w)),
        lambda w: w[0].zero_(),
    ],
)
def test_the_evaluation_cache_notices_every_edit(edit):
    layer = randomised(AOLLinear(4, 4)).eval()
    with torch.no_grad():
        first = layer.weight
        assert layer.weight is first
        edit(layer.parametrizations.weight.original)
        assert torch.equal(layer.weight, constrain(_plain(layer)).weight)
        assert not torch.equal(layer.weight, first)


def _plain(layer):
    plain = nn.Linear(4, 4)
    plain.weight.data.copy_(layer.parametrizations.weight.original)
    return plain


def test_a_weight_cached_in_inference_mode_can_be_used_with_gradients_of_the_input():
    layer = AOLLinear(4, 4).eval().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.rand(1, 4))
    x = torch.rand(1, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_accumulation_rescales_once_and_gives_the_gradient_of_every_micro_batch():
    layer, twin = (randomised(AOLConv2d(4, 8, 3, stride=2)) for _ in range(2))
    rule = aol_of(layer)
    rule.accumulate(True)
    for seed in range(4):
        x = torch.rand(3, 4, 7, 7, generator=torch.Generator().manual_seed(seed))
        for one in (layer, twin):
            one(x).square().sum().backward()
    raw, expected = (one.parametrizations.weight.original for one in (layer, twin))
    assert raw.grad is None
    rule.flush()
    assert (raw.grad - expected.grad).abs().max() <= 2e-6 * expected.grad.abs().max()


def test_an_edit_in_mid_window_is_met_by_a_new_weight_and_loses_no_gradient():
    layer, twin = (randomised(AOLLinear(3, 3)) for _ in range(2))
    aol_of(layer).accumulate(True)
    for scale in (1.0, 2.0):
        for one in (layer, twin):
            with torch.no_grad():
                one.parametrizations.weight.original.mul_(scale)
            one(torch.ones(1, 3)).square().sum().backward()
    aol_of(layer).flush()
    assert torch.allclose(*(one.parametrizations.weight.original.grad for one in (layer, twin)), rtol=1e-5)


def test_a_copy_takes_no_window_and_no_cache_along():
    layer = randomised(AOLLinear(3, 3))
    aol_of(layer).accumulate(True)
    layer(torch.ones(1, 3)).sum().backward()
    twin = copy.deepcopy(layer)
    aol_of(twin).flush()
    assert twin.parametrizations.weight.original.grad is None


def test_a_plain_checkpoint_loads_and_the_other_direction_names_the_plugin():
    def plain():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def converted():
        layers = plain()
        return nn.Sequential(constrain(layers[0]), BatchCentering(4), NActivation(4), constrain(layers[3]))

    saved, ours = plain(), converted()
    ours.load_state_dict(saved.state_dict())
    assert torch.equal(ours[0].parametrizations.weight.original, saved[0].weight)
    assert torch.equal(ours[1].running_mean, saved[1].running_mean)
    with pytest.raises(RuntimeError, match="groundwire_aol"):
        saved.load_state_dict(ours.state_dict())
    converted().load_state_dict(ours.state_dict())


def test_a_converted_checkpoint_with_a_missing_key_is_still_refused():
    saved = nn.Sequential(NActivation(4), BatchCentering(4)).state_dict()
    for key in ("0.theta", "1.running_mean"):
        state = {k: v for k, v in saved.items() if k != key}
        with pytest.raises(RuntimeError, match=key):
            nn.Sequential(NActivation(4), BatchCentering(4)).load_state_dict(state)


def test_the_rescale_runs_in_float32_under_autocast():
    layer = randomised(AOLConv2d(8, 8, 3))
    expected = layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, expected)


def test_setting_the_weight_sets_the_raw_one():
    layer, w = AOLLinear(3, 3), torch.randn(3, 3)
    layer.weight = w
    assert torch.equal(layer.parametrizations.weight.original, w)


def test_reset_parameters_draws_the_raw_weight_anew():
    layer = AOLConv2d(3, 6, 3)
    before = layer.parametrizations.weight.original.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.parametrizations.weight.original, before)
    assert parametrize.is_parametrized(layer)


def test_layers_compile_export_and_work_with_torch_func():
    layer = randomised(AOLConv2d(2, 4, 3))
    x = torch.rand(1, 2, 5, 5)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x), layer(x), atol=1e-6)
    parameters = dict(layer.named_parameters())

    def loss(p):
        return torch.func.functional_call(layer, p, (x,)).sum()

    gradients = torch.func.grad(loss)(parameters)
    layer(x).sum().backward()
    name = "parametrizations.weight.original"
    assert torch.allclose(gradients[name], layer.parametrizations.weight.original.grad, atol=1e-6)


def test_only_linear_layers_of_torch_are_taken():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (nn.ReLU(), Standardised(2, 2, 3)):
        with pytest.raises(TypeError):
            constrain(layer)
