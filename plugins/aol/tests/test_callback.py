"""The callback in Lightning: conversion, caches, logs, report, checkpoints, export, refusals."""

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundwire
from groundwire import Plugin, PluginError, Report, hookimpl
from groundwire_aol import AOL, MaxMin, OffsetCrossEntropy, certified_accuracy, lipschitz_bound
from groundwire_aol.functional import rescale
from groundwire_aol.parametrization import aol_of, parametrizations


def images(rows=96):
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:rows] / 16).float().view(-1, 1, 8, 8), torch.tensor(y[:rows]))


class Net(pl.LightningModule):
    def __init__(self, late=False):
        super().__init__()
        self.late = late
        self.loss = OffsetCrossEntropy(0.4)
        if not late:
            self.build()

    def build(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )

    def configure_model(self):
        if self.late and not hasattr(self, "net"):
            self.build()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def fit(kit, module, *callbacks, val=True, **options):
    loader = DataLoader(images(), 16)
    return kit.fit(module, *callbacks, loader=loader, val=loader if val else None, **{"max_epochs": 2, **options})


@pytest.mark.parametrize("late", [False, True])
def test_a_fit_logs_what_the_functions_say(kit, late):
    module = Net(late)
    trainer = fit(kit, module, AOL(eps=(0.1, 0.5)))
    x, y = images().tensors
    module.eval()
    with torch.no_grad():
        expected = certified_accuracy(module(x), y, (0.0, 0.1, 0.5), lipschitz_bound(module, x))
    logged = [trainer.callback_metrics[f"aol/{name}"].item() for name in ("clean", "certified@0.1", "certified@0.5")]
    assert logged == pytest.approx(expected.tolist(), abs=1e-6)
    assert logged[0] > 0.5
    assert isinstance(module.net[2], MaxMin)
    assert trainer.callback_metrics["aol/lipschitz"].item() == pytest.approx(1, abs=1e-5)


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

    monkeypatch.setattr("groundwire_aol.parametrization.rescale", counted)
    module = Net()
    fit(kit, module, AOL(log=False), val=False, accumulate_grad_batches=3, max_epochs=1)
    assert len(calls) == 2 * len(list(parametrizations(module)))  # 6 batches, 2 steps


def test_a_fit_without_certificates_logs_none_and_still_converts(kit):
    callback = AOL(log=False)
    trainer = fit(kit, Net(), callback)
    assert callback.log is False
    assert not [name for name in trainer.callback_metrics if name.startswith("aol/")]
    assert any("MaxMin" in line for line in callback.changes)


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


def test_mixed_precision_is_certified_in_float32(kit):
    module = Net()
    trainer = fit(kit, module, AOL(eps=(0.1,)), precision="bf16-mixed")
    x, y = images().tensors
    module.eval()
    with torch.no_grad():
        expected = certified_accuracy(module(x), y, (0.1,), lipschitz_bound(module, x))
    assert trainer.callback_metrics["aol/certified@0.1"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_scores_that_are_scaled_after_the_head_are_certified_as_they_are_returned(kit):
    class Scaled(Net):
        def forward(self, x):
            return 0.01 * self.net(x)

    module = Scaled()
    trainer = fit(kit, module, AOL(eps=(0.1,)))
    x, y = images().tensors
    module.eval()
    with torch.no_grad():
        expected = certified_accuracy(module(x), y, (0.1,), lipschitz_bound(module, x))
    assert trainer.callback_metrics["aol/certified@0.1"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_deviations_are_counted(kit):
    module, plain = Net(), Net()
    ours = fit(kit, module, AOL(eps=(0.1,), input_std=0.25))
    theirs = fit(kit, plain, AOL(eps=(0.025, 0.4)))
    assert ours.callback_metrics["aol/lipschitz"].item() == pytest.approx(4, abs=1e-4)
    assert ours.callback_metrics["aol/certified@0.1"] == theirs.callback_metrics["aol/certified@0.4"]


def test_images_out_of_range_are_warned_of(kit):
    class Standardised(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    x, y = images().tensors
    loader = DataLoader(TensorDataset((x - x.mean()) / x.std(), y), 16)
    with pytest.warns(UserWarning, match="input_std"):
        kit.fit(Standardised(), AOL(), loader=loader)


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


def test_targets_that_are_no_classes_are_left_out_with_a_warning(kit):
    class Regression(Net):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self(batch[0]).square().mean())

    x, _ = images().tensors
    loader = DataLoader(TensorDataset(x, torch.rand(len(x))), 16)
    with pytest.warns(UserWarning, match="no class numbers"):
        trainer = kit.fit(Regression(), AOL(), loader=loader, val=loader)
    assert "aol/clean" not in trainer.callback_metrics


@pytest.mark.parametrize(
    "wrong", [{"activation": "relu"}, {"steps": 3}, {"eps": (-1.0,)}, {"eps": ()}, {"input_std": 0.0}, {"init": "no"}]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be"):
        AOL(**wrong)


def test_a_module_without_forward_is_certified_by_its_only_network(kit):
    class Bare(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = fit(kit, Bare(), groundwire.Plugins([AOL()], head="net.3"))
    assert 0 < trainer.callback_metrics["aol/clean"] <= 1


def test_radii_cover_rounding_unless_they_are_asked_not_to(kit):
    module, exact = Net(), AOL(eps=(0.1,), rounding=False)
    covering = AOL(eps=(0.1,))
    trainer = fit(kit, module, covering)
    fit(kit, Net(), exact)
    x, y = images().tensors
    module.eval()
    with torch.no_grad():
        scores, bound = module(x), lipschitz_bound(module, x)
    expected = certified_accuracy(scores, y, (0.1,), bound, inputs=x)
    assert trainer.callback_metrics["aol/certified@0.1"].item() == pytest.approx(expected.item(), abs=1e-6)
    largest = 2 * bound.rounding.error(x.double().flatten(1).norm(dim=1)).max() / float(bound)
    assert trainer.callback_metrics["aol/rounding"].item() == pytest.approx(largest.item(), rel=1e-3)
    assert exact.results["validate"].certified[0.1] >= covering.results["validate"].certified[0.1]
    assert "rounding" not in exact.results["validate"].metrics


def test_rounding_that_takes_much_of_a_radius_is_told(kit, tmp_path):
    x, y = images().tensors
    loader = DataLoader(TensorDataset(torch.cat([x, torch.full_like(x, 1e3)], 2), y), 16)

    class Tall(Net):
        """Rounding grows with the images, radii do not."""

        def build(self):
            super().build()
            self.net[4] = nn.Linear(256, 16)

    plugins = groundwire.Plugins([AOL(eps=(0.1,), input_std=1.0)], report_dir=tmp_path / "report")
    kit.fit(Tall(), plugins, loader=loader, val=loader, max_epochs=1)
    found = next(f for f in Report.read(tmp_path / "report").findings if f.code == "rounding")
    assert found.severity == "warn"
    assert found.value > 0.01


def test_a_model_whose_rounding_has_no_bound_is_certified_in_exact_arithmetic_with_a_warning(kit):
    class Upsampled(Net):
        def build(self):
            super().build()
            self.net.insert(0, nn.Upsample(scale_factor=2, mode="bilinear"))
            self.net.insert(1, nn.MaxPool2d(2))

    with pytest.warns(UserWarning, match="certifies exact arithmetic"):
        trainer = fit(kit, Upsampled(), AOL(eps=(0.1,)))
    assert trainer.callback_metrics["aol/certified@0.1"] >= 0
    assert "aol/rounding" not in trainer.callback_metrics
