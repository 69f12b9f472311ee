"""BatchNorm statistics come from the step that visits the layers; a layer that is not visited keeps its own."""

import copy
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from groundwire import Fields, Plugins, Report
from groundwire_cram import CrAM, prune, recalibrate_batchnorm


class AutoEncoder(pl.LightningModule):
    """As in many templates: ``forward`` embeds, training reconstructs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 8))

    def forward(self, x):
        return self.encoder(x)

    def reconstruct(self, batch):
        x = batch.pixels if isinstance(batch, Sample) else batch[0]
        return (self.decoder(self.encoder(x)) - x).square().mean()

    def training_step(self, batch, batch_idx):
        return self.reconstruct(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.reconstruct(batch), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def statistics(module):
    return {name: b.clone() for name, b in module.named_buffers() if "running" in name}


def batches(n=4):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 8, generator=generator) * 3 + 1,) for _ in range(n)]


def test_layers_that_forward_does_not_visit_stay_and_are_named():
    module = AutoEncoder()
    module.train()
    for batch in batches():
        module.reconstruct(batch)
    before = statistics(module)
    with pytest.warns(UserWarning, match=r"forward of AutoEncoder does not visit decoder\.1, whose statistics stay"):
        recalibrate_batchnorm(module, batches())
    after = statistics(module)
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith("decoder"), name


def test_a_step_replaces_forward():
    module, twin = AutoEncoder(), AutoEncoder()
    assert recalibrate_batchnorm(module, batches(), step=lambda m, batch: m.reconstruct(batch)) is module
    recalibrate_batchnorm(nn.Sequential(twin.encoder, twin.decoder), batches())
    for name, value in statistics(twin).items():
        assert torch.equal(statistics(module)[name], value)
    assert not torch.equal(module.decoder[1].running_mean, torch.zeros(6))


class Sample(NamedTuple):
    name: str
    pixels: torch.Tensor
    weight: float
    length: int


def test_batches_of_the_users_own_kind_are_read_by_fields():
    module, twin = AutoEncoder().encoder, AutoEncoder().encoder
    own = [Sample("a", x, 1.0, 8) for (x,) in batches()]
    recalibrate_batchnorm(module, own, fields=lambda batch: Fields(batch.pixels))
    recalibrate_batchnorm(twin, batches())
    assert torch.equal(module[1].running_var, twin[1].running_var)


@pytest.mark.parametrize("own", [False, True])
def test_in_a_run_the_statistics_are_those_of_the_training_step(kit, own):
    """What evaluate_every reports is what a script measures with the same step."""
    data = [Sample("a", x, 1.0, 8) for (x,) in batches()] if own else batches()
    module, logger = AutoEncoder(), pl.loggers.CSVLogger(kit.path, name="", version="")
    options = {"loader": DataLoader(data, batch_size=None), "val": DataLoader(data, batch_size=None), "logger": logger}
    kit.fit(module, CrAM(0.5, evaluate_every=1), Plugins(fields=lambda batch: Fields(batch[0])), **options)
    [page] = kit.path.rglob("findings.json")
    found = {f.code: f.value for f in Report.read(page.parent).findings}
    small = recalibrate_batchnorm(prune(module, 0.5), data, step=lambda m, batch: m.reconstruct(batch)).eval()
    with torch.no_grad():
        expected = torch.stack([small.reconstruct(batch) for batch in data]).mean()
    assert found["val_loss@0.5"] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_fn_is_the_step_of_a_manual_optimization(kit):
    class Manual(AutoEncoder):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.reconstruct(batch))
            optimizer.step()

    module = Manual()
    data = batches()
    plugin = CrAM(0.5, evaluate_every=1, loss_fn=lambda m, batch: m.reconstruct(batch))
    before = []

    class Watch(pl.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            before.append((trainer.global_step, copy.deepcopy(pl_module.state_dict())))

        def on_validation_end(self, trainer, pl_module):
            step, state = before.pop()
            assert step == trainer.global_step
            assert all(torch.equal(value, state[name]) for name, value in pl_module.state_dict().items())

    loader = DataLoader(data, batch_size=None)
    kit.fit(module, plugin, Watch(), loader=loader, val=loader)
    assert not before
