"""Importing all packages changes nothing in torch, and a run with all plugins leaves nothing there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    "groundwire",
    *(path.name for path in ROOT.glob("plugins/*/src/groundwire_*") if (path / "__init__.py").exists()),
]

CODE = """
import importlib, logging, pkgutil, sys, tempfile, warnings
import torch
import torch.nn.modules.module as module_home, torch.optim.optimizer as optimizer_home
from torch.utils.data import DataLoader, TensorDataset
import lightning.pytorch as pl

CLASSES = (torch.nn.Module, torch.optim.Optimizer, torch.Tensor, pl.Trainer, pl.LightningModule, pl.Callback)

def state():
    found = {}
    for home in (module_home, optimizer_home):
        hooks = {name: value for name, value in vars(home).items() if "hook" in name and isinstance(value, dict)}
        found |= {f"{home.__name__}.{name}": len(value) for name, value in hooks.items()}
    for cls in CLASSES:
        found |= {f"{cls.__name__}.{name}": id(value) for name, value in vars(cls).items() if callable(value)}
    return found | {"torch.load": id(torch.load), "excepthook": id(sys.excepthook)}

def changed(before):
    now = state()
    return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
before = state()
for package in sys.argv[1:]:
    home = importlib.import_module(package)
    for info in pkgutil.walk_packages(home.__path__, package + "."):
        if not info.name.endswith(("__main__", "triton", "fixtures")) and ".triton" not in info.name:
            importlib.import_module(info.name)
assert not changed(before), f"importing changed {changed(before)}"

from groundwire import Plugin, hookimpl
from groundwire_bias_audit import BiasAudit
from groundwire_cram import CrAM
from groundwire_limes import LIMES

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    def forward(self, x): return self.net(x)
    def training_step(self, batch, i): return torch.nn.functional.cross_entropy(self(batch["x"]), batch["y"])
    validation_step = training_step
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)

class Observes(Plugin):
    score_stages, needs_ids = ("train", "validate"), True
    @hookimpl
    def gw_batch_start(self): return None
    @hookimpl
    def gw_scores(self): return None

warnings.simplefilter("ignore")
rows = [{"x": torch.randn(4), "y": i % 2, "group": i % 2} for i in range(32)]
with tempfile.TemporaryDirectory() as folder:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    plugins = [CrAM(), LIMES(batches_per_step=2), BiasAudit(), Observes()]
    trainer = pl.Trainer(max_epochs=1, callbacks=plugins, default_root_dir=folder, accelerator="cpu", **off)
    trainer.fit(Net(), DataLoader(rows, 8), DataLoader(rows, 8))
assert not changed(before), f"a run left {changed(before)}"
"""


@pytest.mark.slow
def test_importing_everything_and_a_run_leave_torch_as_it_was():
    command = [sys.executable, "-c", CODE, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
