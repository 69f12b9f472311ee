"""A last layer with rows of length 1 is certified per pair of classes, never by the rule with sqrt(2)."""

import math

import pytest
import torch
from aol_digits_net import Net, fit, images
from torch import nn

import groundwire
from groundwire_aol import (
    AOL,
    AOLLinear,
    MaxMin,
    NormalizedLinear,
    UnknownLipschitzError,
    bake,
    certified_accuracy,
    certified_radius,
    lipschitz,
    lipschitz_bound,
)
from groundwire_aol.certify.attacks import l2_attack


def network(classes=4):
    torch.manual_seed(0)
    net = nn.Sequential(AOLLinear(6, 8), MaxMin(), NormalizedLinear(8, classes))
    for p in net.parameters():
        p.data.normal_()
    return net.eval()


def test_rows_have_length_one_whatever_the_raw_weight():
    assert torch.allclose(network()[2].weight.norm(dim=1), torch.ones(4))


def test_two_opposite_rows_get_the_radius_that_is_true_and_not_that_of_root_two():
    net = nn.Sequential(NormalizedLinear(2, 2, bias=False))
    net[0].weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[0.1, 0.0]])
    bound = lipschitz_bound(net, x)
    scores = net(x).detach()
    radius = certified_radius(scores, torch.tensor([0]), bound, inputs=x).item()
    assert radius == pytest.approx(0.1, rel=1e-4)
    assert radius <= 0.1
    assert certified_radius(scores, torch.tensor([0]), float(bound)).item() <= radius * (1 + 1e-6)  # a number is looser
    assert float(bound) == pytest.approx(math.sqrt(2), rel=1e-6)


def test_attacks_inside_the_radii_fail():
    net = network()
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    bound, scores = lipschitz_bound(net, x), net(x).detach()
    y = scores.argmax(1)
    radii = certified_radius(scores, y, bound, inputs=x)
    assert (radii > 0).float().mean() > 0.9
    for start in (torch.zeros_like(x), torch.randn_like(x)):
        moved = l2_attack(net, x, y, radii * (1 - 1e-5), 40, start)
        assert (net(x + moved).argmax(1) == y).all()
    rows = net[2].weight.detach().double()
    s = scores.double()
    pairs = [
        min(float((s[i, y[i]] - s[i, j]) / (rows[y[i]] - rows[j]).norm()) for j in range(4) if j != y[i])
        for i in range(20)
    ]
    assert radii[:20].tolist() == pytest.approx(pairs, rel=1e-3)


def test_a_plain_checkpoint_loads_and_one_with_an_aol_head_says_what_it_is():
    layer = NormalizedLinear(3, 2)
    plain = nn.Linear(3, 2)
    layer.load_state_dict(plain.state_dict())
    assert torch.allclose(layer.weight, plain.weight / plain.weight.norm(dim=1, keepdim=True))
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="groundwire_aol"):
        layer.load_state_dict(AOLLinear(3, 2).state_dict())


def test_a_baked_model_gives_the_same_scores_from_plain_weights():
    net, x = network(), torch.randn(5, 6)
    before = net(x)
    assert torch.equal(bake(net)(x), before)
    assert all(".parametrizations" not in name for name in net.state_dict())


def test_the_conversion_normalizes_the_layer_of_the_scores_only():
    stock = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model, changes = lipschitz(stock, torch.rand(1, 6), last_layer="normalized")
    assert changes[2] == "2: Linear -> rows of length 1, certified per pair of classes"
    assert "up to 2" in changes[-1]
    assert lipschitz(model, last_layer="normalized")[1] == []
    with pytest.raises(UnknownLipschitzError, match="not given by a Linear"):
        lipschitz(nn.Sequential(nn.Linear(6, 8), nn.Flatten()), last_layer="normalized")


def test_the_callback_certifies_per_pair_and_exports_plain_weights(kit):
    module = Net()
    trainer = fit(kit, module, AOL(eps=(0.1,), last_layer="normalized"))
    x, y = images().tensors
    module.eval()
    with torch.no_grad():
        bound = lipschitz_bound(module, x)
        expected = certified_accuracy(module(x), y, (0.1,), bound, inputs=x)
    assert bound.head.body == pytest.approx(1, abs=1e-5)
    assert trainer.callback_metrics["aol/certified@0.1"].item() == pytest.approx(expected.item(), abs=1e-6)
    plain = groundwire.export(module).eval()
    assert torch.allclose(plain(x), module(x).detach(), atol=1e-6)
    assert torch.allclose(plain.net[6].weight.norm(dim=1), torch.ones(10))
