"""Stock networks become 1-Lipschitz, with a list of what was changed; what has no rule is refused."""

import pytest
import torch
from torch import nn

from groundwire_aol import (
    BatchCentering,
    MaxMin,
    NActivation,
    UnknownLipschitzError,
    UnsoundError,
    lipschitz,
    lipschitz_bound,
)
from groundwire_aol.certify.attacks import max_jacobian_norm


class Block(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Conv2d(i, o, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.short(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.body = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.pool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.body(self.stem(x))), 1))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(16, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.b(torch.cat([x, self.a(x)], dim=1)))


STOCK = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 3)), (8,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(),
    nn.Linear(8 * 9, 3)), (1, 8, 8)),
    "resnet": (ResNet, (1, 16, 16)),
    "dense connection": (Dense, (8,)),
    "decoder": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.PReLU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.ELU(),
    nn.Upsample(scale_factor=2)), (1, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("activation", ["maxmin", "nactivation", None])
def test_a_stock_network_becomes_1_lipschitz(name, activation):
    make, shape = STOCK[name]
    torch.manual_seed(0)
    plain = make()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    x = torch.rand(2, *shape)
    if activation is None and name in ("mlp", "cnn"):
        model, changes = lipschitz(plain, x, activation=None)
        assert any("counted, not changed" in line for line in changes)  # GELU and SiLU are steeper than 1
        return
    model, changes = lipschitz(plain, x, activation=activation)
    for seed in range(3):
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p)
        bound = float(lipschitz_bound(model, x))
        assert bound <= 1 + 1e-4
        assert max_jacobian_norm(model, x[:1]) <= bound
    assert "proved" in changes[-1]
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    model.load_state_dict(plain.state_dict())  # a checkpoint of the plain model loads
    with pytest.raises(RuntimeError, match="groundwire_aol"):
        make().load_state_dict(model.state_dict())


def test_a_converted_network_trains_and_is_not_converted_again():
    torch.manual_seed(0)
    model, changes = lipschitz(ResNet(), torch.rand(2, 1, 16, 16))
    assert sum("convex" in line for line in changes) == 2
    before = {k: v.clone() for k, v in model.state_dict().items()}
    again, more = lipschitz(model)
    assert more == []
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
    model(torch.rand(4, 1, 16, 16)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_signals_neither_grow_nor_vanish_at_the_start():
    torch.manual_seed(0)
    layers = [m for _ in range(10) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    model, _ = lipschitz(nn.Sequential(*layers))
    x = torch.randn(4, 8, 6, 6)
    assert torch.allclose(model(x).norm(), x.norm(), rtol=1e-3)


def test_the_start_draws_nothing():
    make = lambda: (torch.manual_seed(3), ResNet())[1]  # noqa: E731
    one = lipschitz(make())[0].state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    plain = ResNet()
    torch.set_rng_state(state)
    other = lipschitz(plain)[0].state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, other[k]) for k, v in one.items())


def test_present_weights_can_be_kept():
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    plain[1].running_mean.fill_(3)
    model, _ = lipschitz(plain, init="keep")
    assert torch.equal(model[0].parametrizations.weight.original, plain[0].weight)
    assert model[1].running_mean.tolist() == [3] * 4


def test_what_is_frozen_stays_frozen():
    stock = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    stock[:2].requires_grad_(False)
    model, _ = lipschitz(stock, torch.rand(2, 1, 8, 8))
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"4"}


def test_what_is_excluded_stays_and_is_counted():
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    plain[2].weight.data.mul_(10)
    model, _changes = lipschitz(plain, torch.rand(1, 4), exclude=("2",))
    assert type(model[2]) is nn.Linear
    norm = float(torch.linalg.matrix_norm(plain[2].weight.detach(), 2))
    assert float(lipschitz_bound(model, torch.rand(1, 4))) == pytest.approx(norm, rel=1e-4)
    with pytest.raises(ValueError, match="no submodule"):
        lipschitz(plain, exclude=("head",))


def test_data_divided_by_a_deviation_is_told():
    _, changes = lipschitz(nn.Sequential(nn.Linear(4, 4)), input_std=(0.2, 0.5))
    assert "L * 5" in changes[-1]


@pytest.mark.parametrize(
    ("module", "path"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "1"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), "1"),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU()), "1"),
        (lambda: nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), "0"),
        (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2, mode="bicubic"))), "0.1"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), "1"),
    ],
)
def test_what_has_no_rule_is_refused_with_its_path_and_nothing_is_changed(module, path):
    plain = module()
    before = str(plain)
    with pytest.raises(UnknownLipschitzError) as raised:
        lipschitz(plain, inplace=True)
    assert raised.value.path == path
    assert "->" in str(raised.value)
    assert str(plain) == before


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_makes_is_refused_and_nothing_is_changed(hook):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), hook(nn.Linear(4, 4)))
    before = str(plain)
    with pytest.raises(UnknownLipschitzError, match=r"^2: a hook makes its weight.* -> remove it"):
        lipschitz(plain, inplace=True)
    assert str(plain) == before


@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_parametrized_layer_starts_orthogonal_too(make):
    model, changes = lipschitz(nn.Sequential(make(nn.Linear(8, 8))), torch.rand(2, 8))
    assert "orthogonal start" in changes[0]
    weight = model.eval()[0].weight
    assert torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-4)
    assert float(lipschitz_bound(model, torch.rand(2, 8))) <= 1 + 1e-6


def test_a_parametrization_that_takes_no_weight_is_kept_and_said_to_be():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    layer = nn.Linear(4, 4)
    raw = layer.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    model, changes = lipschitz(nn.Sequential(layer), torch.rand(2, 4))
    assert "orthogonal start" not in changes[0]
    assert torch.equal(model[0].parametrizations.weight.original, raw)


def test_an_unsound_padding_is_refused_with_its_path():
    with pytest.raises(UnsoundError, match=r"^0: padding_mode 'reflect'"):
        lipschitz(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")))


@pytest.mark.parametrize("wrong", [{"activation": "relu"}, {"steps": 3}, {"init": "random"}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        lipschitz(nn.Sequential(nn.Linear(2, 2)), **wrong)


def test_the_kinds_of_layers_that_come_out():
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Tanh())
    assert [type(m) for m in lipschitz(plain)[0]][1:] == [BatchCentering, MaxMin, nn.Tanh]
    assert type(lipschitz(plain, activation="nactivation")[0][2]) is NActivation
