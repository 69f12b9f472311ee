"""A bound is used for the model, the weights and the arithmetic that it was proved for, and for nothing else."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from groundwire_aol import (
    AOLLinear,
    CertifiedAccuracy,
    CertifiedRadius,
    MaxMin,
    UnknownLipschitzError,
    UnsoundError,
    certified_accuracy,
    certified_radius,
    lipschitz_bound,
)
from groundwire_aol.certify import certificates
from groundwire_aol.certify.attacks import l2_attack


def network():
    torch.manual_seed(0)
    return nn.Sequential(AOLLinear(6, 8), MaxMin(), AOLLinear(8, 8), MaxMin(), nn.Linear(8, 3)).eval()


def data(rows=64):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def told():
    """Warnings that come once come in each of these tests."""
    certificates._warn_of_exact_arithmetic.cache_clear()
    yield
    certificates._warn_of_exact_arithmetic.cache_clear()


# The last layer


def test_certificates_per_pair_hold_with_the_bound_up_to_the_last_layer():
    net, x = network(), data()
    net[4].weight.data.mul_(5)
    bound = lipschitz_bound(net, x, upto="4")
    scores = net(x).detach()
    y = scores.argmax(1)
    radii = certified_radius(scores, y, bound, last_layer=net[4].weight, inputs=x)
    assert float(bound) == pytest.approx(1, abs=1e-5)
    assert "up to 4" in str(bound)
    assert (radii >= certified_radius(scores, y, lipschitz_bound(net, x), inputs=x) - 1e-9).all()
    moved = l2_attack(net, x, y, radii * (1 - 1e-5), 40, torch.zeros_like(x))
    assert (net(x + moved).argmax(1) == y).all()


def test_the_bound_of_the_whole_model_is_refused_for_the_last_layer():
    net, x = network(), data()
    with pytest.raises(ValueError, match="upto"):
        certified_radius(net(x).detach(), torch.zeros(64).long(), lipschitz_bound(net, x), last_layer=net[4].weight)


def test_the_bound_of_the_body_needs_its_last_layer():
    net, x = network(), data()
    bound, scores, y = lipschitz_bound(net, x, upto="4"), net(x).detach(), torch.zeros(64).long()
    with pytest.raises(ValueError, match=r"last_layer=4\.weight"):
        certified_radius(scores, y, bound)
    with pytest.raises(ValueError, match="not the weight of 4"):
        certified_radius(scores, y, bound, last_layer=net[4].weight / 2)
    with pytest.raises(ValueError, match="last_layer"):
        CertifiedAccuracy((0.0,), bound).update(scores, y)


@pytest.mark.parametrize("path", ["0", "1", "nowhere", ""])
def test_only_the_linear_layer_that_gives_the_scores_is_a_last_layer(path):
    with pytest.raises(UnknownLipschitzError, match="not the Linear layer"):
        lipschitz_bound(network(), data(), upto=path)


# The weights


@pytest.mark.parametrize("how", ["in place", "data", "replaced", "buffer", "attribute"])
def test_a_bound_is_refused_after_the_weights_changed(how):
    net, x = network(), data()
    if how == "buffer":
        net.insert(1, nn.BatchNorm1d(8).eval())
    if how == "attribute":
        net[1] = nn.LeakyReLU()
    bound = lipschitz_bound(net, x)
    scores, y = net(x).detach(), torch.zeros(64).long()
    assert certified_radius(scores, y, bound, inputs=x).shape == (64,)
    assert "unchanged" in str(bound)
    with torch.no_grad():
        if how == "in place":
            net[-1].weight.mul_(2)
        elif how == "data":
            net[-1].weight.data.mul_(2)
        elif how == "attribute":
            net[1].negative_slope = 7.0
        elif how == "buffer":
            net[1].running_var.mul_(0.1)
        else:
            net[-1].weight = nn.Parameter(2 * net[-1].weight)
    with pytest.raises(UnsoundError, match="changed since"):
        certified_radius(scores, y, bound, inputs=x)
    with pytest.raises(UnsoundError, match="changed since"):
        CertifiedRadius(bound)


def test_a_bound_outlives_its_model_unchecked():
    net, x = network(), data()
    bound, scores = lipschitz_bound(net, x), net(x).detach()
    loaded = pickle.loads(pickle.dumps(bound))
    assert loaded == bound
    assert "unchecked" in str(loaded)
    assert "unchanged" in str(copy.deepcopy(bound))
    del net
    assert "unchecked" in str(bound)
    assert certified_radius(scores, scores.argmax(1), bound, inputs=x).max() > 0


# What must be said


def test_the_constant_must_be_given():
    scores, y = torch.randn(4, 3), torch.zeros(4).long()
    for call in (
        lambda: certified_radius(scores, y),
        lambda: certified_accuracy(scores, y),
        CertifiedAccuracy,
        CertifiedRadius,
    ):
        with pytest.raises(TypeError, match=r"lipschitz=lipschitz_bound\(model, inputs\)"):
            call()
    assert certified_radius(scores, y, lipschitz=1.0).shape == (4,)


# Arithmetic


def scores_in_half_precision(dtype):
    net, x = network(), data()
    with torch.autocast("cpu", dtype), torch.no_grad():
        return net, x, net(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_refused_where_rounding_is_covered(dtype):
    net, x, scores = scores_in_half_precision(dtype)
    bound, y = lipschitz_bound(net, x), scores.argmax(1)
    with pytest.raises(ValueError, match="autocast"):
        certified_radius(scores, y, bound, inputs=x)
    with pytest.raises(UnsoundError, match="all scores are numbers of"):
        certified_radius(scores.float(), y, bound, inputs=x)
    with pytest.raises(UnsoundError, match="all scores are numbers of"):
        certified_radius((300 * scores).float(), y, bound, inputs=x)


def test_scores_of_other_inputs_or_of_another_model_are_refused():
    net, x = network(), data()
    bound, y = lipschitz_bound(net, x), torch.zeros(64).long()
    inside = nn.Sequential(*net[:4], nn.Linear(8, 3)).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half_inside = net(x).float() * 1.0000001
    for scores in (net(x + 0.01).detach(), inside(x).detach(), half_inside + 1e-5):
        with pytest.raises(UnsoundError, match="not those that the model computes"):
            certified_radius(scores, y, bound, inputs=x)
    net.train()
    assert certified_radius(net.eval()(x).detach(), y, bound, inputs=x).shape == (64,)
    net.train()
    certified_radius(net(x).detach(), y, bound, inputs=x)
    assert net.training


def test_active_autocast_is_refused_where_rounding_is_covered():
    net, x = network(), data()
    bound, scores = lipschitz_bound(net, x), net(x).detach()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsoundError, match="autocast is active"):
        certified_radius(scores, scores.argmax(1), bound, inputs=x)


def test_the_metrics_say_of_which_arithmetic_they_are():
    net, x = network(), data()
    bound, scores = lipschitz_bound(net, x), net(x).detach()
    for metric in (CertifiedAccuracy((0.1,), bound), CertifiedRadius(bound)):
        assert metric.arithmetic == "exact"
        metric.update(scores, scores.argmax(1), x)
        assert metric.arithmetic == "floating"
        assert "'floating'" in repr(metric)
        metric.update(scores, scores.argmax(1))
        assert metric.arithmetic == "exact"


def test_a_radius_of_exact_arithmetic_is_told_once(told):
    net, x = network(), data()
    bound, scores = lipschitz_bound(net, x), net(x).detach()
    with pytest.warns(UserWarning, match="exact arithmetic"):
        certified_radius(scores, scores.argmax(1), bound)
    certified_radius(scores, scores.argmax(1), bound)
    assert math.isfinite(float(certified_radius(scores, scores.argmax(1), bound).max()))
