"""LightningCLI: the audit and its gate come from YAML and from the command line of a script that knows neither."""

import runpy
from contextlib import suppress

import pytest

from groundwire import Report

SCRIPT = """
import lightning.pytorch as pl, torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Rows(TensorDataset):
    sex = ["f", "m"] * 100

class Module(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    validation_step = training_step
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(200, 4)
        return DataLoader(Rows(x, (x[:, 0] > 0).long()), 50)
    val_dataloader = train_dataloader

if __name__ == "__main__":
    cli = LightningCLI(Module, Data, seed_everything_default=0, save_config_kwargs={"overwrite": True})
    audit = next(c for c in cli.trainer.callbacks if type(c).__name__ == "BiasAudit")
    print(audit.gate)
    print(audit.baseline, [(name, result.features) for name, result in audit.results["validate"].items()])
"""
YAML = """
trainer:
  max_epochs: 1
  logger: false
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: groundwire_bias_audit.BiasAudit
      init_args:
        groups: [sex]
        variants: [0.5, 0.9]
        baseline: 0.5
        gate:
          tolerance: 0.1
          metrics: [accuracy, selection_rate]
          correction: bh
"""
GATE = "Gate(tolerance=0.1, alpha={}, metrics=('accuracy', 'selection_rate'), min_count=30, correction='bh'"
RESULTS = "0.5 [('dense', ('sex',)), ('0.5', ('sex',)), ('0.9', ('sex',))]"


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI calls what jsonargparse deprecated


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "user.yaml").write_text(YAML)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["script.py", "fit", *arguments])
        with suppress(SystemExit):  # of --help
            runpy.run_path("script.py", run_name="__main__")
        return capsys.readouterr()

    return run


def test_the_audit_and_its_gate_come_from_yaml_and_again_from_the_saved_configuration(run, tmp_path):
    shown = run("--config", "user.yaml").out
    assert GATE.format(0.05) in shown
    assert RESULTS in shown
    assert {"verdict", "verdict@0.9"} <= {finding.code for finding in Report.read(tmp_path).findings}
    shown = run("--config", "config.yaml", "--trainer.callbacks.gate.alpha=0.01").out
    assert GATE.format(0.01) in shown
    assert RESULTS in shown


def test_help_explains_every_argument_and_a_wrong_one_is_named(run):
    text = " ".join(run("--trainer.callbacks.help", "groundwire_bias_audit.BiasAudit").out.split())
    for words in (
        "--trainer.callbacks.groups GROUPS Sensitive features",
        "gate.tolerance TOLERANCE Largest gap that is",
    ):
        assert words in text
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        run("--config", "user.yaml", "--trainer.callbacks.gate.metrics=[acuracy]")
