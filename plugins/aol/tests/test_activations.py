"""Activations, centering and initialisers."""

import pytest
import torch
from torch import nn

from groundwire_aol import BatchCentering, GroupSort, MaxMin, NActivation
from groundwire_aol.layers.initialisers import (
    identity_centre_,
    nearest_orthogonal_,
    orthogonal_centre_,
    repeated_orthogonal_,
)
from groundwire_aol.layers.rescale import Geometry, rescale

ACTIVATIONS = [
    MaxMin(),
    MaxMin("halves"),
    GroupSort(2),
    GroupSort(4),
    GroupSort(None),
    NActivation(8),
    NActivation(8, "log_uniform"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3, 3)])
def test_activations_keep_the_length_of_gradients(activation, shape):
    x = torch.randn(shape, requires_grad=True)
    g = torch.randn(shape)
    (found,) = torch.autograd.grad(activation(x), x, g)
    assert torch.allclose(found.flatten(1).norm(dim=1), g.flatten(1).norm(dim=1), atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations_never_move_two_points_apart(activation):
    x, y = 3 * torch.randn(2, 200, 8)
    assert ((activation(x) - activation(y)).norm(dim=1) <= (x - y).norm(dim=1) + 1e-5).all()


def test_maxmin_pairs_neighbours_or_halves():
    x = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    assert MaxMin("adjacent")(x).tolist() == [[2, 1, 4, 3]]
    assert MaxMin("halves")(x).tolist() == [[4, 3, 1, 2]]
    assert torch.equal(MaxMin()(x), GroupSort(2, descending=True)(x))


def test_odd_channels_are_refused_with_the_shape():
    with pytest.raises(ValueError, match=r"\(2, 7, 3, 3\)"):
        MaxMin()(torch.zeros(2, 7, 3, 3))


def test_the_n_activation_is_the_published_function():
    layer = NActivation(1, init=(-1.0, 2.0))
    x = torch.tensor([[-3.0], [-1.0], [0.5], [2.0], [5.0]])
    assert layer(x).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.5, -2.0, 1.0], abs=1e-5)


def test_knots_are_sorted_and_learn_slowly():
    one, other = NActivation(2, init=(2.0, -1.0), lr_factor=1e-2), NActivation(2, init=(-1.0, 2.0), lr_factor=1.0)
    x = torch.randn(50, 2)
    assert torch.allclose(one(x), other(x), atol=1e-5)
    moved = []
    for layer in (one, other):
        before = layer(x)
        before.square().sum().backward()
        torch.optim.SGD(layer.parameters(), 1e-4).step()
        moved.append(float((layer(x) - before).detach().abs().max()))
    assert moved[0] < 0.1 * moved[1]


def test_the_default_knots_are_absolute_value_and_identity_in_turn():
    x = torch.randn(10, 4)
    assert torch.allclose(
        NActivation(4)(x), torch.stack([x[:, 0].abs(), x[:, 1], x[:, 2].abs(), x[:, 3]], 1), atol=1e-5
    )


@pytest.mark.parametrize("wrong", [{"init": "other"}, {"init": (1.0,)}, {"lr_factor": 0.0}])
def test_wrong_knots_are_refused(wrong):
    with pytest.raises(ValueError, match=r"init|lr_factor"):
        NActivation(2, **wrong)


def test_centering_follows_batchnorm_without_its_division():
    centre, norm = BatchCentering(3), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) + 2
        assert torch.allclose(centre(x), x - x.mean((0, 2, 3), keepdim=True), atol=1e-6)
        norm(x)
    assert torch.allclose(centre.running_mean, norm.running_mean, atol=1e-6)
    centre.eval()
    assert torch.allclose(centre(x), x - norm.running_mean.view(1, 3, 1, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "stride", "groups"),
    [((6, 6, 3, 3), 1, 1), ((4, 8, 3, 3), 1, 1), ((8, 4, 3, 3), 2, 1), ((8, 2, 2, 2), 2, 2)],
)
def test_the_rescale_leaves_orthogonal_starts_as_they_are(shape, stride, groups):
    geometry = Geometry((stride, stride), (1, 1), groups)
    w = nearest_orthogonal_(torch.randn(shape, dtype=torch.float64), geometry)
    assert (rescale(w, geometry) - w).abs().max() < 1e-6
    assert w.abs().sum() > 0


def test_the_other_initialisers_are_left_as_they_are_too():
    identity = identity_centre_(torch.empty(5, 5, 3, 3))
    orthogonal = orthogonal_centre_(torch.empty(5, 3, 3, 3))
    repeated = repeated_orthogonal_(torch.empty(4, 10))
    for w, side in ((identity, "in"), (orthogonal, "auto"), (repeated, "in")):
        assert (rescale(w, side=side) - w).abs().max() < 1e-5
