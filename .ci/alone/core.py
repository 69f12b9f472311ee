"""Fit with a plugin of one's own, in an environment that holds nothing but core's wheel and what it asks for."""

import importlib.util
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundwire
from groundwire import Finding, Plugin, hookimpl


class Steps(Plugin):
    @hookimpl
    def gw_findings(self, run):
        return [Finding("steps", "count", "info", run.trainer.global_step, "Steps taken.")]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.layer(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


assert "site-packages" in groundwire.__file__, f"{groundwire.__file__} is not the installed wheel"
assert importlib.util.find_spec("matplotlib") is None, "matplotlib came without being asked for"
data = TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
pl.Trainer(max_epochs=1, callbacks=[Steps()], **options).fit(Net(), DataLoader(data, 16))
(written,) = Path("groundwire").glob("*/findings.json")
assert "Steps taken." in written.read_text("utf-8"), written.read_text("utf-8")
print(f"groundwire {groundwire.__version__}: fitted with core alone, the findings are on disk")
