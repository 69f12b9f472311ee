"""What the callback certifies and logs, and what it warns of."""

import lightning.pytorch as pl
import pytest
import torch
from aol_digits_net import Net, fit, images
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundwire
from groundwire import Fields, Report
from groundwire_aol import AOL, MaxMin, UnknownLipschitzError, certified_accuracy, lipschitz, lipschitz_bound
from groundwire_aol.evaluation import CertifiedPass


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


def test_a_fit_without_certificates_logs_none_and_still_converts(kit):
    callback = AOL(log=False)
    trainer = fit(kit, Net(), callback)
    assert callback.log is False
    assert not [name for name in trainer.callback_metrics if name.startswith("aol/")]
    assert any("MaxMin" in line for line in callback.changes)


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


def standardise(x):
    return (x - 0.5) / 0.1


class Standardised(Net):
    def validation_step(self, batch, batch_idx):
        self(standardise(batch[0]))


class SecondBatch(Net):
    def validation_step(self, batch, batch_idx):
        self(standardise(batch[0]) if batch_idx else batch[0])


class InForward(Net):
    def forward(self, x):
        return self.net(standardise(x))


class BesideForward(InForward):
    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


@pytest.mark.parametrize("module", [Standardised, SecondBatch, BesideForward])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_that_computes_another_function_than_the_model_is_not_certified(kit, module, precision):
    with pytest.raises(groundwire.PluginError, match="scores of the step are not those of the model"):
        fit(kit, module(), AOL(eps=(0.1,)), precision=precision, max_epochs=1)


def test_what_forward_does_before_the_network_is_certified_with_it(kit):
    trainer = fit(kit, InForward(), AOL(eps=(0.1,)), max_epochs=1)
    assert trainer.callback_metrics["aol/lipschitz"].item() == pytest.approx(10, rel=1e-4)


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


def test_one_score_for_two_classes_is_refused_before_training(kit):
    class Binary(Net):
        steps = 0

        def build(self):
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 4).float())

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    module = Binary()
    with pytest.raises(groundwire.PluginError, match=r"net\.3 gives one score for two classes"):
        fit(kit, module, AOL(), num_sanity_val_steps=1)
    assert module.steps == 0
    fit(kit, module, AOL(log=False))


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


class Shift:
    """A forward hook of somebody else's that says it adds a vector."""

    changes = "shift"

    def __call__(self, layer, arguments, output):
        return output + torch.tensor([0.0, 1.0, 0.0])


def test_a_correction_of_the_scores_is_not_covered_and_said():
    net = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.rand(8, 4), torch.randint(3, (8,))
    net[0].register_forward_hook(Shift())
    done = CertifiedPass((0.1,))
    with pytest.warns(UserWarning, match="a correction is added"):
        done.update(net, net(x).detach(), Fields(x, y))
    assert "rounding" not in done.compute().metrics


def test_a_hook_that_does_not_say_what_it_adds_is_refused():
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].register_forward_hook(lambda layer, arguments, output: 2 * output)
    with pytest.raises(UnknownLipschitzError, match="may change what it computes"):
        lipschitz_bound(net, torch.rand(1, 4))


def test_a_float64_run_is_certified_in_float64_with_less_rounding(kit):
    double, single = AOL(eps=(0.1,)), AOL(eps=(0.1,))
    fit(kit, Net(), double, precision="64-true")
    fit(kit, Net(), single)
    ratio = double.results["validate"].rounding / single.results["validate"].rounding
    assert ratio == pytest.approx(2.0**-29, rel=0.2)


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")  # no row is repeated here
def test_two_processes_tell_of_the_samples_of_both(kit):
    class Quiet(Net):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    module = Quiet()
    module.net, _ = lipschitz(module.net, images().tensors[0][:1])
    trainer = kit.trainer(AOL(), strategy=strategy, devices=2)
    trainer.validate(module, DataLoader(images(), 16), verbose=False)
    [folder] = (kit.path / "groundwire").iterdir()
    [told] = [f.message for f in Report.read(folder).findings if f.code == "certified_accuracy"]
    assert "(96 samples)" in told
