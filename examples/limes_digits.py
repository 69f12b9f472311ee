"""Digits whose mix follows the hour of the day: a small network with and without LIMES.

Prints accuracy (each batch before it is learned from) and writes a report page with pictures.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from groundwire import Plugins
from groundwire_limes import LIMES, StreamDataModule


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.hits, self.rows = 0, 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        scores = self(x)
        self.hits += int((scores.argmax(dim=1) == y).sum())
        self.rows += len(y)
        return nn.functional.cross_entropy(scores, y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def stream(days: int, rows_per_hour: int, seed: int = 0) -> StreamDataModule:
    """Noisy digits; each class is more frequent at another time of the day."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    size, phase = rng.uniform(0.8, 1.8, 10), rng.uniform(0, 2 * np.pi, 10)
    picked = []
    for hour in range(24 * days):
        prior = np.exp(size * np.cos(2 * np.pi * hour / 24 + phase))
        classes = rng.choice(10, rows_per_hour, p=prior / prior.sum())
        picked += [rng.choice(np.flatnonzero(y == k)) for k in classes]
    noisy = (x[picked] + 7 * rng.standard_normal((len(picked), 64))) / 16
    rows = TensorDataset(torch.tensor(noisy, dtype=torch.float32), torch.tensor(y[picked]))
    return StreamDataModule(rows, np.repeat(np.arange(24 * days) * 3600, rows_per_hour), batch_size=100)


def fit(data: StreamDataModule, folder: Path, *callbacks: pl.Callback) -> float:
    torch.manual_seed(0)
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(model, datamodule=data)
    return model.hits / model.rows


def main(arguments=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--rows", type=int, default=500, help="rows in an hour")
    parser.add_argument("--out", type=Path, default=Path("groundwire-limes"))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available).*")
    data = stream(options.days, options.rows)
    ways = {"without": (), "with LIMES": (Plugins([LIMES()], report_dir=options.out),)}
    found = {name: fit(data, options.out, *callbacks) for name, callbacks in ways.items()}
    for name, accuracy in found.items():
        print(f"{name:12} {100 * accuracy:.1f} % right before learning")
    print(f"Report with pictures: {options.out / 'report.html'}")
    return found


if __name__ == "__main__":
    main()
