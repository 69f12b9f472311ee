"""Lightning programs as users have them: with the callback added, only the gradient changes."""

import csv
import os
import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from groundwire import Plugin, hookimpl
from groundwire_cram import CrAM


class Dicts(Dataset):
    """Rows as dicts, as many data sets give them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        x, y = self.dataset[i]
        return {"image": x, "label": y, "meta": {"row": i}}


class Regression(pl.LightningModule):
    """Dict batches, dict outputs, dropout, a per-step scheduler, several metrics."""

    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, width), nn.Dropout(0.2), nn.GELU(), nn.Linear(width, 1))
        self.order, self.steps = [], []

    def forward(self, image):
        return self.net(image).squeeze(-1)

    def training_step(self, batch, batch_idx):
        self.order.append(batch["meta"]["row"].tolist())
        loss = nn.functional.mse_loss(self(batch["image"]), batch["label"].float())
        self.log_dict({"mse": loss.detach(), "rmse": loss.detach().sqrt()}, on_step=True, on_epoch=True)
        return {"loss": loss, "extra": 1}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.steps.append((self.global_step, sorted(outputs)))

    def validation_step(self, batch, batch_idx):
        self.log("val_mse", nn.functional.mse_loss(self(batch["image"]), batch["label"].float()))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Replays(Plugin):
    """Pays for a second pass and keeps the first gradient, so that everything must stay the same."""

    @hookimpl
    def gw_gradient(self, step):
        with step.perturbed() as weights:
            for weight in weights.values():
                weight.mul_(0.5)
            step.replay()


def program(kit, name, *callbacks, **options):
    """Everything a user can see of one training."""
    folder = kit.path / name
    torch.manual_seed(0)
    module = Regression()
    loggers = [pl.loggers.CSVLogger(folder, name="", version=""), pl.loggers.TensorBoardLogger(folder, name="tb")]
    usual = [
        pl.callbacks.EMAWeightAveraging(),
        pl.callbacks.LearningRateMonitor("step"),
        pl.callbacks.EarlyStopping("val_mse"),
        pl.callbacks.ModelCheckpoint(folder / "kept", every_n_train_steps=3, save_top_k=-1, monitor=None),
    ]
    options = {"max_epochs": 2, "log_every_n_steps": 1, "enable_checkpointing": True, "logger": loggers, **options}
    train = DataLoader(Dicts(kit.data()), 8, shuffle=True)
    trainer = kit.fit(module, *callbacks, *usual, loader=train, val=DataLoader(Dicts(kit.data(16)), 8), **options)
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    kept = {p.name: torch.load(p, weights_only=True) for p in (folder / "kept").iterdir()}
    return module, trainer, rows, kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 2},
    ],
    ids=str,
)
def test_a_replay_alone_changes_nothing_a_user_can_see(kit, options):
    module, trainer, rows, kept = program(kit, "plain", **options)
    ours, trainer_too, rows_too, kept_too = program(kit, "ours", Replays(), **options)
    assert module.order == ours.order
    assert module.steps == ours.steps
    assert rows == rows_too
    assert kit.difference(module.state_dict(), ours.state_dict()) == 0.0
    assert kept.keys() == kept_too.keys()
    for name, checkpoint in kept.items():
        assert kit.difference(checkpoint["state_dict"], kept_too[name]["state_dict"]) == 0.0
        assert set(kept_too[name]) - set(checkpoint) == {"groundwire"}
    assert trainer.callback_metrics.keys() == trainer_too.callback_metrics.keys()


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}], ids=str)
def test_cram_changes_the_gradient_and_nothing_else(kit, options):
    module, trainer, rows, _kept = program(kit, "plain", **options)
    ours, trainer_too, rows_too, _kept_too = program(kit, "ours", CrAM(), **options)
    assert module.order == ours.order
    assert module.steps == ours.steps
    assert [set(r) for r in rows] == [set(r) for r in rows_too]
    assert [r["lr-AdamW"] for r in rows] == [r["lr-AdamW"] for r in rows_too]
    assert list(module.state_dict()) == list(ours.state_dict())
    assert kit.difference(module.state_dict(), ours.state_dict()) > 0
    states = [t.optimizers[0].state_dict() for t in (trainer, trainer_too)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert [list(s) for s in states[0]["state"].values()] == [list(s) for s in states[1]["state"].values()]


CLI = """
import lightning.pytorch as pl, torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Module(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(0, 2, (16,))), 8)

if __name__ == "__main__":
    cli = LightningCLI(Module, Data, seed_everything_default=0)
    if cli.subcommand == "fit":
        print([type(c).__name__ for c in cli.trainer.callbacks])
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
          - class_path: groundwire_cram.CrAM
            init_args: {sparsities: [0.5, 0.9], rho: 0.1}
        report: false
"""


def run_cli(tmp_path, *arguments):
    (tmp_path / "script.py").write_text(textwrap.dedent(CLI))
    (tmp_path / "user.yaml").write_text(YAML)
    command = [sys.executable, "script.py", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), check=False)


@pytest.mark.slow
def test_lightning_cli_takes_plugins_from_yaml(tmp_path):
    done = run_cli(tmp_path, "fit", "--config", "user.yaml")
    assert done.returncode == 0, done.stderr
    assert "'Plugins'" in done.stdout


@pytest.mark.slow
def test_lightning_cli_takes_a_plugin_from_the_command_line(tmp_path):
    arguments = ["--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    arguments += ["--trainer.callbacks+=groundwire_cram.CrAM", "--trainer.callbacks.rho=0.9"]
    done = run_cli(tmp_path, "fit", *arguments)
    assert done.returncode == 0, done.stderr
    assert "'CrAM'" in done.stdout


@pytest.mark.slow
def test_operators_and_layers_to_skip_come_from_yaml(tmp_path):
    chain = "{class_path: groundwire_cram.Chain, init_args: {operators: [{class_path: groundwire_cram.Magnitude, "
    chain += "init_args: {sparsity: 0.5}}, {class_path: groundwire_cram.Quantize, init_args: {bits: 4}}]}}"
    (tmp_path / "operators.yaml").write_text(
        YAML.replace("{sparsities: [0.5, 0.9], rho: 0.1}", f"{{compress: {chain}, skip: [net.0]}}")
    )
    done = run_cli(tmp_path, "fit", "--config", "operators.yaml")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_help_of_a_plugin_reads_well(tmp_path):
    done = run_cli(tmp_path, "fit", "--trainer.callbacks.help=groundwire_cram.CrAM")
    assert "Fractions of weights to prune" in done.stdout
    assert "--trainer.callbacks.rho" in done.stdout
