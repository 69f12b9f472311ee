"""FLEA from a LightningCLI: a script and a YAML file as users have them."""

import os
import subprocess
import sys

import pytest
import yaml

SCRIPT = """
import lightning.pytorch as pl, numpy as np, torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Sites(pl.LightningDataModule):
    def train_dataloader(self):
        rng = np.random.default_rng(0)
        site, a = np.arange(1600) % 4, rng.integers(2, size=1600)
        x = np.column_stack([rng.normal(size=(1600, 2)), a]).astype("float32")
        y = (x[:, 0] + rng.normal(size=1600) > 0).astype(int)
        y[site == 2] = 1 - y[site == 2]
        return DataLoader(TensorDataset(*map(torch.tensor, (x, y, a, site))), 100, shuffle=True)


if __name__ == "__main__":
    cli = LightningCLI(Net, Sites, seed_everything_default=0)
    if cli.subcommand == "fit":
        [flea] = [c for c in cli.trainer.callbacks if type(c).__name__ == "FLEA"]
        print("kept", flea.decision.named(True), "steps", cli.trainer.global_step)
"""
FLEA = {
    "class_path": "groundwire_flea.FLEA",
    "init_args": {"source": 3, "groups": 2, "n_clean": 0.75, "always_keep": [0], "permutations": 0},
}
TRAINER = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture
def cli(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(*arguments, callbacks=()):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": {**TRAINER, "callbacks": list(callbacks)}}))
        environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "COLUMNS": "200"}
        command = [sys.executable, "train.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_a_callback_in_the_yaml_filters_and_keeps_its_types(cli):
    assert "kept [0, 1, 3] steps 12" in cli("fit", "--config", "run.yaml", callbacks=[FLEA])


@pytest.mark.slow
def test_help_describes_every_argument(cli):
    text = " ".join(cli("fit", "--trainer.callbacks.help=groundwire_flea.FLEA").split())
    for name in ("source", "groups", "n_clean", "fairness", "mode", "embed", "seed", "always_keep", "n_jobs"):
        assert f".{name} " in text, name
    assert "How many sources are assumed clean" in text
    assert "{demographic_parity,equal_opportunity,equalized_odds}" in text
