"""Models and inputs that no bound can be given for are refused with their path and the reason."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from groundwire_aol import AOLConv2d, AOLLinear, UnknownLipschitzError, UnsoundError, lipschitz_bound


def test_a_hook_or_a_replaced_forward_is_refused():
    hooked = nn.Sequential(nn.Linear(3, 3))
    hooked[0].register_forward_hook(lambda layer, args, output: 5 * output)
    replaced = nn.Sequential(nn.Linear(3, 3))
    replaced[0].forward = lambda x: 5 * x
    old = nn.Sequential(nn.Linear(3, 3))
    old[0].register_forward_pre_hook(lambda layer, args: (5 * args[0],))
    for module in (hooked, replaced, old):
        with pytest.raises(UnknownLipschitzError, match="0: "):
            lipschitz_bound(module, torch.rand(1, 3))


def test_a_subclass_with_its_own_forward_is_entered_not_trusted():
    class Tenfold(nn.Linear):
        def forward(self, x):
            return 10 * super().forward(x)

    net = nn.Sequential(Tenfold(3, 3))
    net[0].weight.data.copy_(torch.eye(3))
    assert float(lipschitz_bound(net, torch.rand(1, 3))) == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    layer = AOLLinear(3, 3)
    layer.parametrizations.weight.original.data[0, 0] = value
    with pytest.raises(UnsoundError, match="not finite"):
        lipschitz_bound(nn.Sequential(layer), torch.rand(1, 3))


def test_a_parametrization_that_makes_nan_is_refused():
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    layer.parametrizations.weight.original1.data[0] = 0
    with pytest.raises(UnsoundError, match="not finite"):
        lipschitz_bound(nn.Sequential(layer), torch.rand(1, 3))


def test_weights_that_do_not_exist_yet_are_refused():
    with pytest.raises(UnsoundError, match="run one batch"):
        lipschitz_bound(nn.Sequential(nn.LazyLinear(3)), torch.rand(1, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it imports its compiler
def test_a_compiled_module_is_refused_with_the_way_out():
    with pytest.raises(UnknownLipschitzError, match="_orig_mod"):
        lipschitz_bound(torch.compile(nn.Sequential(nn.Linear(3, 3))), torch.rand(1, 3))


def test_sizes_of_the_input_may_be_used_but_not_decided_on():
    class Unpacked(nn.Module):
        def forward(self, x):
            b, c, h, w = x.shape
            return 2 * x.view(b, c * h, w).reshape(-1, c * h * w)

    class Deciding(nn.Module):
        def forward(self, x):
            return x if x.dim() == 4 else 5 * x

    assert float(lipschitz_bound(Unpacked(), torch.rand(1, 2, 3, 3))) == pytest.approx(2, rel=1e-5)
    with pytest.raises(UnknownLipschitzError, match="or shapes"):
        lipschitz_bound(Deciding(), torch.rand(1, 2, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_refused_with_what_was_measured(dtype):
    with pytest.raises(UnsoundError, match=r"1\.00257"):
        lipschitz_bound(nn.Sequential(AOLLinear(3, 3)).to(dtype), torch.rand(1, 3))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, dtype=torch.uint8), "image", torch.zeros(())])
def test_an_input_that_is_no_float_batch_is_refused(wrong):
    with pytest.raises(UnsoundError, match=r"input"):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3)), wrong)


def test_an_input_of_the_wrong_shape_is_an_error_that_says_so():
    with pytest.raises(UnsoundError, match=r"0: the model cannot take an input of shape \(5,\)"):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3)), torch.rand(1, 5))


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(AOLConv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    lipschitz_bound(net, torch.rand(2, 1, 5, 5))
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
