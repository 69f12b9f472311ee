"""What is compressed: the weights of layers, whoever wrote the layer; and along which of their dimensions."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from groundwire import PluginError, Report
from groundwire_cram import ACDC, NM, CrAM, CrAMOptimizer, Quantize, compress, freeze_masks, prune, quantize
from groundwire_cram.operators import quantized
from groundwire_cram.prunable import describe, selected


class Block(nn.Module):
    """As in ConvNeXt: a layer norm over (C, H, W), and a scale for each channel."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm([8, 6, 6])
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.layer_scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))

    def forward(self, x):
        return x + self.layer_scale * self.conv(self.norm(x))


class Tokens(nn.Module):
    """As in a ViT: a token, a table of positions, and attention."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.split = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True)
        self.lstm = nn.LSTM(8, 4, proj_size=2)
        self.cell = nn.GRUCell(8, 4)


class RMSNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class MyLinear(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))


class Routed(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))


class Conv1D(nn.Module):
    """As in transformers: (in, out)."""

    def __init__(self, out, into):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize(
    ("module", "pruned"),
    [
        (Block(), {"conv.weight"}),
        (
            Tokens(),
            {"attention.in_proj_weight", "attention.out_proj.weight", "split.out_proj.weight"}
            | {f"split.{name}_proj_weight" for name in "qkv"}
            | {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0", "cell.weight_ih", "cell.weight_hh"},
        ),
        (nn.ModuleList([nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)]), {"0.weight", "1.weight"}),
        (nn.Bilinear(2, 3, 4), {"weight"}),
        (nn.ModuleList([nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Linear(8, 1)]), {"2.weight"}),
        (nn.ModuleList([RMSNorm2d(), MyLinear(4, 1), Routed(1, 4), Routed(2, 4)]), {"1.weight", "3.weight"}),
        (nn.ModuleList([nn.ConvTranspose2d(4, 2, 3), Conv1D(6, 4)]), {"0.weight", "1.weight"}),
    ],
)  # fmt: skip
def test_weights_of_layers_are_pruned_and_nothing_else(module, pruned):
    rows = CrAM().describe(module)
    assert [row.name for row in rows] == [name for name, _ in module.named_parameters()]
    assert {row.name for row in rows if row.pruned} == pruned
    assert all(row.reason for row in rows)
    assert {row.name: row.shape for row in rows} == {n: tuple(p.shape) for n, p in module.named_parameters()}


@pytest.mark.parametrize("sparsity", [0.1, 0.9])
def test_scales_tokens_and_normalisations_keep_every_entry(sparsity):
    for module in (Block(), Tokens()):
        small = prune(module, sparsity)
        for row in describe(module):
            if not row.pruned:
                assert torch.equal(small.get_parameter(row.name), module.get_parameter(row.name)), row.name


def test_a_subclass_of_torchs_layers_counts_as_one_and_a_tied_weight_by_any_of_its_holders():
    class Normalised(nn.LayerNorm):
        pass

    class NormLinear(nn.Linear):
        pass

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.table = self.layer.weight

    assert selected(nn.ModuleList([Normalised([4, 4]), NormLinear(4, 4)])) == ["1.weight"]
    assert selected(Tied()) == ["table"]


def test_a_parametrized_weight_is_that_of_its_layer():
    layer = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)))
    assert selected(layer) == ["0.parametrizations.weight.original"]
    norm = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm([4, 4]))
    parametrize.register_parametrization(norm[1], "weight", nn.Identity())
    assert selected(norm) == ["0.weight"]


def test_the_published_rule_under_compat():
    assert selected(Block(), compat="reference") == ["layer_scale", "norm.weight", "norm.bias", "conv.weight"]
    small = prune(Block(), 0.9, compat="reference")
    assert not small.layer_scale.any()
    assert [row.reason for row in CrAM(compat="reference").describe(nn.Linear(2, 2))] == [
        "has more than one dimension",
        "has fewer than two dimensions",
    ]


def test_what_is_left_out_is_in_the_report(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 3))

        def forward(self, x):
            return super().forward(x) * self.scale

    module = Module()
    kit.fit(module, CrAM(0.5, skip="net.0"), logger=pl.loggers.CSVLogger(kit.path))
    [page] = kit.path.rglob("report.html")
    text = page.read_text()
    for row in CrAM(0.5, skip="net.0").describe(module):
        assert row.pruned or (row.name in text and row.reason in text), row
    assert Report.read(page.parent).findings


def test_a_model_whose_own_parameters_are_no_weights_of_layers_is_refused_with_their_reasons():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(2, 3))

    with pytest.raises(
        ValueError, match=r"nothing to prune: of 1 parameters none.*table: table of Own is not the weight"
    ):
        prune(Own(), 0.5)


def test_nm_and_scales_go_along_the_inputs_of_the_product():
    """The transposed convolution and the Conv1D are those of a Linear layer's weight."""
    linear = nn.Linear(8, 6, bias=False)
    conv, transposed = Conv1D(6, 8), nn.ConvTranspose1d(8, 6, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        transposed.weight.copy_(linear.weight.t()[..., None])
    for change in (lambda m: prune(m, pattern="2:4"), lambda m: quantize(m, 3)):
        expected = change(linear).weight
        assert torch.equal(change(conv).weight, expected.t())
        assert torch.equal(change(transposed).weight[..., 0], expected.t())
    rows = prune(conv, pattern="2:4").weight.t().reshape(6, 2, 4)
    assert ((rows != 0).sum(2) == 2).all()


def test_grouped_transposed_convolutions_have_a_scale_for_each_output_of_each_group():
    layer = nn.ConvTranspose2d(8, 6, 3, groups=2)
    ours = compress(layer, Quantize(4)).weight
    for group in range(2):
        block = layer.weight.detach()[4 * group : 4 * group + 4]
        assert torch.equal(ours[4 * group : 4 * group + 4], quantized(block.transpose(0, 1), 4).transpose(0, 1))


@pytest.mark.parametrize("operator", [NM("2:4"), Quantize(4)])
def test_a_training_step_compresses_as_the_twin_does(operator):
    """The second pass sees the weights that compress() gives."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(6, 8), nn.Unflatten(1, (6, 1)), nn.ConvTranspose1d(6, 4, 1, bias=False), nn.Flatten())
    seen = []
    optimizer = CrAMOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), rho=0, compress=operator, module=net)

    def closure():
        seen.append([p.detach().clone() for p in net.parameters()])
        net(torch.ones(3, 8)).square().sum().backward()

    expected = [p.detach() for p in compress(net, operator).parameters()]
    closure()
    optimizer.step(closure)
    assert all(map(torch.equal, seen[1], expected))


def test_groups_do_not_straddle_rows():
    with pytest.raises(ValueError, match=r"\(4, 6\) stays dense: 4 does not divide the 6 weights of an output"):
        prune(nn.Linear(6, 4), pattern="2:4", strict=True)
    with pytest.warns(UserWarning, match="stays dense"):
        assert prune(nn.Linear(6, 4), pattern="2:4").weight.all()
    assert int((prune(nn.Linear(6, 4), pattern="2:4", strict=False, compat="reference").weight == 0).sum()) == 12
    with pytest.raises(ValueError, match="stays dense"):
        prune(nn.Conv2d(3, 4, 3), pattern="2:4", strict=True)
    prune(nn.Conv2d(4, 4, 3), pattern="2:4", strict=True)


def test_acdc_leaves_scales_alone(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((1, 3), 1e-6))

        def forward(self, x):
            return super().forward(x) * self.scale

    module = Module()
    kit.fit(module, ACDC(0.9, warmup=1, phase=1, final_dense=1, final_sparse=1), max_epochs=4)
    assert module.scale.all()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_several_groups_keep_the_interval_under_compat(interval):
    """Against a loop written here: each parameter group has its own threshold, and keeps its masks for a while."""
    rho, level, lr = 0.1, 0.6, 0.05

    def network():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss(net, step):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        return net(x).square().mean()

    def groups(net):
        return [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}]

    ours = network()
    optimizer = CrAMOptimizer(
        torch.optim.SGD(groups(ours), lr=lr, momentum=0.9),
        level,
        rho,
        interval=interval,
        compat="reference",
        module=ours,
    )
    theirs, masks = network(), {}
    plain = torch.optim.SGD(groups(theirs), lr=lr, momentum=0.9)
    for step in range(7):
        loss(ours, step).backward()
        optimizer.step(lambda step=step: loss(ours, step).backward())
        optimizer.zero_grad()

        loss(theirs, step).backward()
        parameters = list(theirs.parameters())
        first, saved = [p.grad.clone() for p in parameters], [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.add_(g * rho)
            for group in plain.param_groups:
                [weight] = [p for p in group["params"] if p.dim() > 1]
                if step % interval == 0:
                    kept = math.ceil(weight.numel() * (1 - level))
                    masks[weight] = weight.abs() > weight.abs().flatten().sort(descending=True).values[kept - 1]
                weight.mul_(masks[weight])
        plain.zero_grad()
        loss(theirs, step).backward()
        with torch.no_grad():
            for p, g, w in zip(parameters, first, saved, strict=True):
                p.copy_(w)
                p.grad.copy_((p.grad * masks[p] if p in masks else p.grad) + g)
        plain.step()
        plain.zero_grad()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) == 0.0


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean()


def applied(parametrization):
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", parametrization())
    return layer


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), 0),
        (lambda: applied(Centred), 0),
        (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), None),
        (lambda: applied(Doubled), None),
    ],
)
def test_parametrizations_that_lose_zeros_are_refused_and_others_have_them_in_the_weight_as_used(make, kept, kit):
    net = nn.Sequential(make())
    calls = {
        "prune": lambda: prune(net, 0.5),
        "compress": lambda: compress(net, NM("2:4")),
        "freeze": lambda: freeze_masks(net),
        "optimizer": lambda: CrAMOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), module=net),
    }
    before = {key: value.clone() for key, value in net.state_dict().items()}
    if kept is None:
        for name in ("prune", "compress"):
            assert int((calls[name]()[0].eval().weight == 0).sum()) == 32, name
        return
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"does not keep zeros: with 50 % zeros in it, the weight as used has 0 %"):
            call()
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), name

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.Sequential(make(), nn.Linear(8, 16))

    for plugin in (CrAM(), ACDC(0.5, warmup=1, phase=1, final_dense=1, final_sparse=1)):
        with pytest.raises(PluginError, match="does not keep zeros"):
            kit.fit(Module(), plugin, max_epochs=4)
    kit.fit(Module(), CrAM(skip="net.0.0"))


def masked():
    net = nn.Sequential(nn.Linear(8, 8))
    torch.nn.utils.prune.l1_unstructured(net[0], "weight", 0.5)
    net(torch.ones(1, 8))
    return net


def normalised():
    with pytest.warns(FutureWarning, match="weight_norm"):
        net = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8)))
    net(torch.ones(1, 8))
    return net


def spectral():
    net = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(8, 8)))
    net(torch.ones(1, 8))
    return net


def masked_bias():
    net = nn.Sequential(nn.Linear(8, 8))
    torch.nn.utils.prune.l1_unstructured(net[0], "bias", 0.5)
    net(torch.ones(1, 8))
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (masked, r"masks it -> torch\.nn\.utils\.prune\.remove\(layer, 'weight'\) first"),
        (normalised, "weight-normalised layer cannot be pruned.*remove_weight_norm"),
        (spectral, "a hook computes the weight from it"),
        (masked_bias, "Sequential cannot be copied .* -> inplace=True"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"0\.weight has no shape yet -> run one batch through the module"),
    ],
)
def test_weights_that_a_layer_does_not_use_as_they_are_get_our_message(make, message):
    net = make()
    calls = [lambda: prune(net, 0.5), lambda: quantize(net, 4)]
    if make is not masked_bias:
        calls += [lambda: CrAM().minimizer.check(net), lambda: freeze_masks(net), lambda: prune(net, 0.5, inplace=True)]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
