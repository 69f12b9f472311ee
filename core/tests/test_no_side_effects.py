"""Importing changes nothing in torch, and a run leaves nothing there."""

import subprocess
import sys

CODE = """
import importlib.metadata, logging, pkgutil, sys, tempfile, warnings
import torch
import torch.nn.modules.module as module_hooks, torch.optim.optimizer as optimizer_hooks
from torch.utils.data import DataLoader, TensorDataset
import lightning.pytorch as pl

def hooks():
    found = {}
    for home in (module_hooks, optimizer_hooks):
        for name, value in vars(home).items():
            if "hook" in name and hasattr(value, "__len__") and not isinstance(value, str):
                found[f"{home.__name__}.{name}"] = len(value)
    for cls in (torch.nn.Module, torch.optim.Optimizer, torch.optim.SGD, torch.Tensor, DataLoader, pl.Trainer,
                pl.LightningModule, pl.Callback):
        found |= {f"{cls.__name__}.{name}": id(value) for name, value in vars(cls).items() if callable(value)}
    found["torch.load"], found["excepthook"] = id(torch.load), id(sys.excepthook)
    found["filters"] = len(warnings.filters)
    return found

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
before = hooks()
import groundwire
packages = ["groundwire"] + sys.argv[1].split(",")
for package in filter(None, packages):
    home = importlib.import_module(package)
    for info in pkgutil.walk_packages(home.__path__, package + "."):
        if not info.name.endswith("__main__") and "kernels" not in info.name:
            importlib.import_module(info.name)
changed = [name for name, value in hooks().items() if before.get(name) != value]
assert not changed, f"importing changed {changed}"

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    def forward(self, x): return self.net(x)
    def training_step(self, batch, i): return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    validation_step = training_step
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)

class Owner(groundwire.Plugin):
    score_stages, needs_ids = ("train", "validate"), True
    @groundwire.hookimpl
    def gw_gradient(self, step): return step.replay()
    @groundwire.hookimpl
    def gw_batch_start(self, batch): return None
    @groundwire.hookimpl
    def gw_scores(self, scores): return None

def run(*callbacks):
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1, callbacks=list(callbacks), default_root_dir=folder, logger=False,
                             accelerator="cpu", **quiet)
        trainer.fit(Net(), loader, loader)

warnings.simplefilter("ignore")
loader = DataLoader(TensorDataset(torch.randn(16, 4), torch.zeros(16, dtype=torch.long)), 8)
run()  # torch and Lightning wrap some methods of their own at first use
before = hooks()
run(Owner())
changed = [name for name, value in hooks().items() if before.get(name) != value]
assert not changed, f"a run left {changed}"
"""


def test_importing_core_and_running_it_leaves_torch_as_it_was():
    done = subprocess.run([sys.executable, "-c", CODE, ""], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
