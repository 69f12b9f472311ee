"""Compression operators, built in or a user's own, in training and after it."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundwire import Plugin, PluginError, Report, hookimpl
from groundwire_cram import NM, Chain, CrAM, Magnitude, Operator, Quantize, compress, prune, quantize
from groundwire_cram.kernels import forced, select
from groundwire_cram.operators import nm_mask, quantized, residual

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([(2, 4), (4, 8), (1, 4)]), st.integers(0, 999))
def test_an_n_m_mask_keeps_the_n_largest_of_each_group_of_inputs(outputs, groups, pattern, seed):
    n, m = pattern
    weight = torch.randn(outputs, groups * m, 3, 3, generator=torch.Generator().manual_seed(seed))
    mask = nm_mask(weight, n, m)
    columns = weight.abs().permute(0, 2, 3, 1).reshape(-1, m).numpy()
    kept = mask.permute(0, 2, 3, 1).reshape(-1, m).numpy()
    assert (kept.sum(axis=1) == n).all()
    for values, keep in zip(columns, kept, strict=True):
        assert set(np.flatnonzero(keep)) == set(np.argsort(values)[m - n :])


def test_of_equal_magnitudes_the_first_go():
    assert nm_mask(torch.ones(1, 4), 1, 4).tolist() == [[False, False, False, True]]
    with pytest.raises(ValueError, match="are not divided by 4"):
        nm_mask(torch.ones(3, 3), 2, 4)


@given(st.integers(2, 8), dtypes, st.integers(0, 999), st.floats(1e-3, 1e3))
@settings(max_examples=60)
def test_quantized_weights_are_on_their_channels_grid_and_nearest(bits, dtype, seed, size):
    weight = (torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    weight[3] = 0
    found, largest = quantized(weight, bits), 2 ** (bits - 1) - 1
    assert found.dtype == dtype
    wide = weight.double() if dtype == torch.float64 else weight.float()
    scale = wide.abs().amax(1, keepdim=True) / largest
    steps = torch.where(scale > 0, found.to(wide.dtype) / scale, 0)
    slack = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.6, torch.float16: 0.1}[dtype]
    assert (steps - steps.round()).abs().max() < slack
    assert ((found.to(wide.dtype) - wide).abs() <= scale * (0.5 + slack)).all()
    assert torch.equal(weight + residual(weight, bits), found)
    assert not found[weight == 0].any()


def test_third_parties_write_operators_with_one_method():
    class Sign:
        """Binary weights: the sign times the mean magnitude."""

        def apply(self, params):
            return {name: w.sign() * w.abs().mean() - w for name, w in params.items()}

        def __str__(self):
            return "binary"

    assert isinstance(Sign(), Operator)
    layer = compress(nn.Linear(8, 4), Sign())
    assert len(layer.weight.abs().round(decimals=4).unique()) == 1
    assert [str(o) for o in CrAM(compress=Sign()).operators] == ["binary"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.ones(3)}, "must be a tensor of the parameter's shape"),
        ({"other": torch.ones(4, 8)}, "other"),
        ({"weight": None}, "must be a tensor"),
    ],
)
def test_what_an_operator_returns_is_checked(change, text):
    class Bad:
        def apply(self, params):
            return change

    with pytest.raises(ValueError, match=text):
        compress(nn.Linear(8, 4), Bad())


def test_a_chain_keeps_the_zeros_of_its_first_part():
    chain = Chain([Chain([Magnitude(0.75)]), Quantize(4)])
    layer = compress(nn.Linear(64, 16), chain)
    assert int((layer.weight != 0).sum()) <= 255
    assert max(len(row.unique()) for row in layer.weight) <= 15
    twin = nn.Linear(64, 16)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(compress(twin, Quantize(4)).weight, layer.weight)
    weights = {"w": torch.randn(4, 8)}
    assert torch.equal(weights["w"] + chain.apply(weights)["w"] != 0, compress_tensor(weights["w"], chain) != 0)
    with pytest.raises(ValueError, match="at least one operator"):
        Chain([])


def compress_tensor(weight, operator):
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return compress(layer, operator).weight


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_pruning_to_a_pattern_gives_it_in_every_group_and_leaves_others_dense(pattern):
    net = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(32, 4))
    with pytest.warns(UserWarning, match=r"1\.weight of shape \(3, 3, 1, 1\) stays dense"):
        pruned = prune(net, pattern=pattern)
    n, m = map(int, pattern.split(":"))
    assert ((pruned[3].weight.reshape(-1, m) != 0).sum(1) == n).all()
    assert ((pruned[0].weight.permute(0, 2, 3, 1).reshape(-1, m) != 0).sum(1) == n).all()
    assert (pruned[1].weight != 0).all()
    with pytest.raises(ValueError, match="stays dense"):
        prune(net, pattern=pattern, strict=True)


def test_layerwise_pruning_and_the_reference_rule_have_their_own_counts():
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 3))
    layerwise = prune(net, 0.5, "layerwise")
    assert [int((layer.weight == 0).sum()) for layer in layerwise] == [50, 15]
    reference = prune(net, 0.5, compat="reference")
    assert sum(int((layer.weight == 0).sum()) for layer in reference) == 66
    assert sum(int((layer.weight == 0).sum()) for layer in prune(net, 0.5)) == 65


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda net: prune(net, 90), "did you mean 0.9"),
        (lambda net: prune(net), "sparsity must be a fraction"),
        (lambda net: prune(net, 0.5, "2:4"), "fixes the sparsity"),
        (lambda net: prune(net, pattern="blockwise"), "N:M pattern"),
        (lambda net: prune(net, 0.5, compat="old"), "compat must be"),
        (lambda net: prune(net, 0.5, skip="nothing"), "names no prunable parameter"),
        (lambda net: prune(net, 0.5, skip="*"), "leaves nothing to prune"),
        (lambda net: quantize(net, 16), "from 2 to 8"),
        (lambda net: NM("4:4"), "0 < N < M"),
        (lambda net: Magnitude(0.5, "local"), "scope must be"),
        (lambda net: CrAM(0.5, pattern="2:4"), "leave sparsities out"),
        (lambda net: CrAM(pattern="unstructured"), "pattern must be"),
        (lambda net: CrAM(0.5, compress=Quantize(8)), "compress replaces"),
        (lambda net: CrAM(compress=[]), "compress is empty"),
        (lambda net: CrAM(compress="int8"), "which 'i' lacks"),
        (lambda net: CrAM(interval=0), "interval must be"),
        (lambda net: CrAM(compat="old"), "compat must be"),
        (lambda net: select("cuda"), "backend must be one of"),
    ],
)
def test_bad_arguments_are_refused_with_what_to_do(call, text):
    with pytest.raises(ValueError, match=text):
        call(nn.Linear(8, 8))


def test_skip_takes_names_patterns_and_predicates():
    net = nn.ModuleDict({"stem": nn.Linear(4, 4), "body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    for skip in ("body", "body.*", ["body.0", "body.1"], lambda name, p: name.startswith("body")):
        pruned = prune(net, 0.5, skip=skip)
        assert (pruned["body"][0].weight != 0).all()
        assert int((pruned["stem"].weight == 0).sum()) == 8


def test_a_pattern_that_fits_no_layer_is_said_before_training(kit):
    class Odd(kit.Net):
        def __init__(self):
            super().__init__()
            self.odd = nn.Linear(3, 3)

    with pytest.raises(PluginError, match=r"odd\.weight of shape \(3, 3\).*4 does not divide"):
        kit.fit(Odd(), CrAM(pattern="2:4", strict=True))
    with pytest.warns(UserWarning, match=r"odd\.weight.*not pruned to 2:4"):
        kit.fit(Odd(), CrAM(pattern="2:4"))


def test_variants_carry_the_operators_names_and_checkpoints_can_monitor_them(kit):
    cram = CrAM(compress=[Quantize(4), NM("2:4")], evaluate_every=1)
    best = pl.callbacks.ModelCheckpoint(kit.path, monitor="cram/val_acc@2:4", mode="max")
    options = {"enable_checkpointing": True, "logger": pl.loggers.CSVLogger(kit.path, name="", version="")}
    kit.fit(kit.Net(), cram, best, val=kit.loader(), max_epochs=2, **options)
    codes = {f.code for f in Report.read(kit.path).findings}
    assert {"val_acc@int4", "val_acc@2:4", "val_acc@dense", "backend"} <= codes
    assert best.best_model_score is not None
    assert "compressed to int4" in Report.read(kit.path).path.read_text()


class Twice(Plugin):
    """Evaluates every variant two times."""

    after = ("cram",)

    @hookimpl
    def gw_findings(self, run):
        if run.stage == "validate":
            for variant in run.variants() * 2:
                run.evaluate(variant)


def test_each_version_is_recalibrated_once_for_a_set_of_weights(kit, monkeypatch):
    import groundwire_cram.variants as module

    calls = []
    recalibrate = module.update_statistics
    monkeypatch.setattr(module, "update_statistics", lambda *args: calls.append(args) or recalibrate(*args))
    kit.fit(kit.Net(), CrAM((0.5, 0.9)), Twice(), val=kit.loader(), num_sanity_val_steps=0, max_epochs=2)
    assert len(calls) == 4


def test_a_training_gradient_that_is_not_finite_skips_the_step_and_is_reported(kit):
    class Breaks(kit.Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

    class See(pl.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    see = See()
    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    kit.fit(Breaks(), CrAM(), see, logger=logger)
    assert all(torch.equal(a, b) for a, b in zip(see.weights[0], see.weights[1], strict=True))
    assert all(torch.isfinite(p).all() for p in see.weights[-1])
    [finding] = [f for f in Report.read(kit.path).findings if f.code == "nonfinite_steps"]
    assert finding.value == 1
    assert finding.severity == "warn"


@pytest.mark.parametrize("backend", ["reference", "aten", "auto"])
def test_the_backend_that_ran_is_a_finding(kit, backend):
    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    with forced(backend):
        kit.fit(kit.Net(), CrAM(), logger=logger)
    [finding] = [f for f in Report.read(kit.path).findings if f.code == "backend"]
    assert finding.value in ("reference", "aten", "numba")
    assert finding.value in finding.message


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_half_and_double_parameters_train(kit, precision):
    module = kit.Net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    kit.fit(module, CrAM(), precision=precision)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert kit.difference(module.state_dict(), before) > 0
