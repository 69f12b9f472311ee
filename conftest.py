"""What the tests of all packages share: small real modules, quiet Trainers, and loops without Lightning."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire import Plugin, hookimpl

# GNU OpenMP cannot be used in a forked process once its parent has used several threads: it waits for ever. Lightning
# gives forked workers one thread each unless the environment says otherwise, as some libraries make it say.
torch.set_num_threads(1)

for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def environment():
    """What a test or a library that it uses puts into the environment goes with the test."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


def pytest_configure(config):
    """The fixtures of groundwire.testing, also where groundwire is on the path without being installed."""
    if not config.pluginmanager.has_plugin("groundwire"):
        config.pluginmanager.import_plugin("groundwire.testing.fixtures")


def pytest_terminal_summary(terminalreporter):
    """On a machine without a browser: how the skipped tests come to run."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if "browser" in report.keywords]
    if skipped:
        terminalreporter.section("tests in a browser")
        terminalreporter.write_line(f"{len(skipped)} skipped: they open the report in Chromium or Chrome. To run them:")
        terminalreporter.write_line("apt-get install chromium, dnf install chromium, or brew install --cask chromium")


class Net(pl.LightningModule):
    """A classifier with BatchNorm, as a user writes it."""

    def __init__(self, inputs=8, classes=3):
        super().__init__()
        self.net = network(inputs, classes)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return sgd(self.parameters())


def network(inputs=8, classes=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def data(rows=40, inputs=8, classes=3):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, inputs, generator=generator)
    return TensorDataset(x, torch.randint(0, classes, (rows,), generator=generator))


class SAM(Plugin):
    """Sharpness-aware minimization (Foret et al., 2021) on the replay service."""

    name = "sam"

    def __init__(self, rho=0.05, loss_fn=None, same_rng=False):
        self.rho, self.loss_fn, self.same_rng = rho, loss_fn, same_rng

    @hookimpl
    def gw_gradient(self, step, run):
        if self.rho == 0:
            return None
        norm = total_norm(step.grads.values())
        with step.perturbed() as weights:
            for name, grad in step.grads.items():
                weights[name].add_(grad * (self.rho / norm))
            return step.replay(self.loss_fn, same_rng=self.same_rng)


def total_norm(grads):
    return torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))


def sam_step(net, optimizer, batches, divisor=1, rho=0.05, clip=None, loss=nn.functional.cross_entropy, autocast=None):
    """One SAM step without Lightning and without groundwire."""

    def backward():
        optimizer.zero_grad()
        for x, y in batches:
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                value = loss(net(x), y) / divisor
            value.backward()

    params = list(net.parameters())
    backward()
    buffers = [b.clone() for b in net.buffers()]
    old = [p.detach().clone() for p in params]
    norm = total_norm([p.grad for p in params])
    with torch.no_grad():
        for p in params:
            p.add_(p.grad * (rho / norm))
    backward()
    with torch.no_grad():
        for p, w in zip(params, old, strict=True):
            p.copy_(w)
        for b, w in zip(net.buffers(), buffers, strict=True):
            b.copy_(w)
    if clip:
        nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()


def sam_loop(dataset, batch_size=8, accumulate=1, **options):
    net = network()
    optimizer = sgd(net.parameters())
    batches = [dataset[i : i + batch_size] for i in range(0, len(dataset), batch_size)]
    for start in range(0, len(batches), accumulate):
        sam_step(net, optimizer, batches[start : start + accumulate], accumulate, **options)
    return net.state_dict()


def difference(a, b):
    assert list(a) == list(b)
    return max(
        (float((a[k].detach().double() - b[k].detach().double()).abs().max()) for k in a if a[k].numel()), default=0.0
    )


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def kit(tmp_path):
    """Modules, data, loops and a Trainer that is quiet and writes to ``tmp_path`` only."""

    def trainer(*callbacks, package=pl, **options):
        options = {**QUIET, "max_epochs": 1, "default_root_dir": tmp_path, **options}
        return package.Trainer(callbacks=list(callbacks), **options)

    def fit(module, *callbacks, loader=None, val=None, package=pl, ckpt_path=None, **options):
        made = trainer(*callbacks, package=package, **options)
        made.fit(module, DataLoader(data(), 8) if loader is None else loader, val, ckpt_path=ckpt_path)
        return made

    return SimpleNamespace(
        Net=Net, SAM=SAM, network=network, sgd=sgd, data=data, sam_step=sam_step, sam_loop=sam_loop,
        total_norm=total_norm, difference=difference, trainer=trainer, fit=fit, path=tmp_path, QUIET=QUIET,
        loader=lambda **o: DataLoader(data(), 8, **o),
    )  # fmt: skip
