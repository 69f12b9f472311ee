"""The callback from LightningCLI: a script that knows nothing of it, a YAML file, the command line and its help."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import lightning.pytorch as pl, torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Module(pl.LightningModule):
    def __init__(self, width: int = 8, loss: nn.Module = nn.CrossEntropyLoss()):
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)), loss
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch):
        return self.loss(self(batch[0]), batch[1])
    def validation_step(self, batch):
        self(batch[0])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(16, 4), torch.randint(0, 2, (16,))), 8)
    val_dataloader = train_dataloader

if __name__ == "__main__":
    cli = LightningCLI(Module, Data, seed_everything_default=0)
    print(cli.model.loss, sorted(cli.trainer.callback_metrics))
"""

YAML = """
trainer:
  max_epochs: 1
  logger: false
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: groundwire.Plugins
      init_args:
        items:
          - class_path: groundwire_aol.AOL
            init_args: {activation: nactivation, steps: 2, eps: [0.1, 0.5], input_std: [0.5, 0.25]}
        report: false
model:
  loss:
    class_path: groundwire_aol.OffsetCrossEntropy
    init_args: {offset: 0.5}
"""


def run(folder, *arguments):
    (folder / "script.py").write_text(SCRIPT)
    (folder / "user.yaml").write_text(YAML)
    command = [sys.executable, "script.py", "fit", *arguments]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_a_yaml_file_configures_callback_and_loss(tmp_path):
    done = run(tmp_path, "--config", "user.yaml")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()[-1]
    assert "OffsetCrossEntropy(offset=0.5" in told
    for name in ("aol/certified@0.1", "aol/certified@0.5", "aol/clean", "aol/lipschitz"):
        assert name in told


@pytest.mark.slow
def test_the_command_line_explains_every_argument(tmp_path):
    done = run(tmp_path, "--trainer.callbacks.help", "groundwire_aol.AOL")
    assert done.returncode == 0, done.stderr
    for name in ("activation", "steps", "eps", "input_std", "exclude", "log", "init", "rounding"):
        assert f"--trainer.callbacks.{name} " in done.stdout
    assert "radii in l2" in done.stdout.lower()


@pytest.mark.slow
@pytest.mark.parametrize(("argument", "told"), [("steps=3", "steps must be 1 or 2"), ("eps=[-1]", "eps must be radii")])
def test_a_wrong_argument_is_refused_with_its_reason(tmp_path, argument, told):
    done = run(tmp_path, "--trainer.callbacks+=groundwire_aol.AOL", f"--trainer.callbacks.{argument}")
    assert done.returncode != 0
    assert told in done.stderr
