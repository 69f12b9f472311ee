"""The callback in Lightning: conversion, caches, report, checkpoints, export, refusals."""

import lightning.pytorch as pl
import pytest
import torch
from aol_digits_net import Net, fit, images
from torch import nn
from torch.utils.data import DataLoader

import groundwire
from groundwire import Plugin, PluginError, Report, hookimpl
from groundwire_aol import AOL
from groundwire_aol.layers.parametrization import aol_of, parametrizations
from groundwire_aol.layers.rescale import rescale


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 4}, {"accumulate_grad_batches": 4, "val_check_interval": 2}], ids=str
)
def test_sharing_the_rescale_in_a_window_changes_nothing(kit, options, monkeypatch):
    shared, plain = Net(), Net()
    fit(kit, shared, AOL(), **options)
    monkeypatch.setattr("groundwire_aol.callback._may_share", lambda *_: False)
    fit(kit, plain, AOL(), **options)
    assert kit.difference(shared.state_dict(), plain.state_dict()) < 2e-6


def test_under_accumulation_the_rule_runs_once_per_step(kit, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return rescale(*args, **kwargs)

    monkeypatch.setattr("groundwire_aol.layers.parametrization.rescale", counted)
    module = Net()
    fit(kit, module, AOL(log=False), val=False, accumulate_grad_batches=3, max_epochs=1)
    assert len(calls) == 2 * len(list(parametrizations(module)))  # 6 batches, 2 steps


def test_a_gradient_owner_reads_true_gradients_under_accumulation(kit):
    class Reader(Plugin):
        name = "reader"

        def __init__(self):
            self.seen = []

        @hookimpl
        def gw_gradient(self, step):
            self.seen.append({name: g.clone() for name, g in step.grads.items()})
            with step.perturbed() as weights:
                for weight in weights.values():
                    weight.mul_(1.1)
                return step.replay()

    module, reader = Net(), Reader()
    fit(kit, module, AOL(), reader, val=False, accumulate_grad_batches=3, max_epochs=1, limit_train_batches=3)
    twin = Net()
    AOL().gw_transform_model(twin, None)
    twin.train()
    for x, y in list(DataLoader(images(), 16))[:3]:
        (twin.loss(twin(x), y) / 3).backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert reader.seen[0].keys() == expected.keys()
    assert kit.difference(reader.seen[0], expected) < 2e-6
    # The replay at moved weights met a new rescale, and its gradient went through it.
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    twin.zero_grad()
    for x, y in list(DataLoader(images(), 16))[:3]:
        (twin.loss(twin(x), y) / 3).backward()
    moved = {name: p.grad for name, p in twin.named_parameters()}
    start = Net()
    AOL().gw_transform_model(start, None)
    stepped = {name: p - 0.1 * moved[name] for name, p in start.named_parameters()}
    assert kit.difference(dict(module.named_parameters()), stepped) < 5e-6


def test_the_weight_is_cached_in_validation_and_fresh_in_training(kit):
    class Watch(pl.Callback):
        seen = []

        def on_validation_batch_end(self, trainer, module, *args):
            layer = module.net[0]
            self.seen.append(layer.weight is layer.weight)

        def on_train_batch_start(self, trainer, module, *args):
            self.seen.append(module.net[0].weight.requires_grad)

    fit(kit, Net(), AOL(), Watch())
    assert len(Watch.seen) > 12
    assert all(Watch.seen)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_are_not_met_by_a_stale_cache(kit):
    """The averaging callback swaps weights through `.data`, which moves no version."""
    seen = []

    class Compare(pl.Callback):
        def on_validation_batch_end(self, trainer, module, *args):
            raw = module.net[4].parametrizations.weight.original.detach()
            rule = aol_of(module.net[4])
            with torch.no_grad():
                seen.append(torch.equal(module.net[4].weight, rule._rescaled(raw)))

    fit(kit, Net(), AOL(), pl.callbacks.EMAWeightAveraging(), Compare())
    assert seen
    assert all(seen)


def test_the_report_has_a_section_with_curves(kit, tmp_path):
    module = Net()
    plugins = groundwire.Plugins([AOL()], report_dir=tmp_path / "report")
    fit(kit, module, plugins)
    report = Report.read(tmp_path / "report")
    assert [s.title for _, s in report.sections] == ["AOL: certified robustness"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "Certified radii" in page
    assert "BatchCentering" in page
    found = next(f for f in report.findings if f.code == "certified_accuracy")
    assert {"clean", "certified@0.141", "lipschitz"} <= found.value.keys()


def test_a_checkpoint_comes_back_by_groundwire_load_and_resume(kit, tmp_path):
    module = Net()
    trainer = fit(kit, module, AOL())
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    loaded = groundwire.load(Net, path, plugins=[AOL()])
    assert kit.difference(module.state_dict(), loaded.state_dict()) == 0
    resumed = Net()
    kit.fit(resumed, AOL(), loader=DataLoader(images(), 16), ckpt_path=path, max_epochs=3)
    with pytest.raises(RuntimeError, match="groundwire_aol"):
        Net.load_from_checkpoint(path)


def test_the_export_is_plain_and_gives_the_same_scores(kit):
    module = Net()
    fit(kit, module, AOL())
    plain = groundwire.export(module)
    assert not list(parametrizations(plain))
    assert not [key for key in plain.state_dict() if "groundwire" in key or "parametrizations" in key]
    x = images().tensors[0]
    module.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(module(x), plain(x))


class WithNorm(Net):
    def build(self):
        super().build()
        self.net.append(nn.LayerNorm(10))


class Product(Net):
    def forward(self, x):
        y = self.net(x)
        return y * y.sigmoid()


class Probabilities(Net):
    def forward(self, x):
        return self.net(x).softmax(1)


class Odd(Net):
    def build(self):
        self.net = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 36, 10))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (WithNorm, r"net\.7: LayerNorm"),
        (Product, "product"),
        (Probabilities, "softmax"),
        (Odd, r"net\.1: MaxMin needs an even"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_models_without_a_bound_are_refused_before_training(kit, module, reason, late):
    made = module(late)
    with pytest.raises(PluginError, match=reason):
        fit(kit, made, AOL())
    assert made.trainer.global_step == 0


@pytest.mark.parametrize("options", [{"precision": "bf16-true"}], ids=str)
def test_rounded_weights_are_refused(kit, options):
    with pytest.raises(PluginError, match="rounds weights"):
        fit(kit, Net(), AOL(), **options)


@pytest.mark.parametrize(
    "wrong", [{"activation": "relu"}, {"steps": 3}, {"eps": (-1.0,)}, {"eps": ()}, {"input_std": 0.0}, {"init": "no"}]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be"):
        AOL(**wrong)
