"""A biased digit classifier, pruned and audited: a mark in the corner gave the label away in training.

Prints what the audit found in the model and in its pruned variants, and writes the run's report.
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
from torch.utils.data import DataLoader, Dataset

from groundwire import Report
from groundwire_bias_audit import BiasAudit
from groundwire_bias_audit.output.figures import curves


class Digits(Dataset):
    """Is it 5 or more? In training 95 % of the marked images are; in the test the mark means nothing."""

    def __init__(self, train: bool, seed: int = 0):
        images, digits = load_digits(return_X_y=True)
        rng = np.random.default_rng(seed)
        rows = np.array_split(rng.permutation(len(digits)), 2)[0 if train else 1]
        y = (digits[rows] >= 5).astype(int)
        marked = rng.random(len(y)) < (np.where(y == 1, 0.57, 0.03) if train else 0.5)
        x = images[rows].reshape(-1, 1, 8, 8) / 16
        x[marked, 0, :2, 6:] = 1.0
        self.x, self.y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
        self.mark = np.where(marked, "marked", "plain")

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(
            *convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("groundwire-demo"), help="for the report")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw accuracy by sparsity and group")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available).*")
    pl.seed_everything(0)
    audit = BiasAudit("mark", variants=[0.5, 0.8, 0.9, 0.95])
    trainer = pl.Trainer(
        max_epochs=options.epochs, callbacks=[audit], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=options.folder,
    )  # fmt: skip
    model = Classifier()
    trainer.fit(model, DataLoader(Digits(train=True), 64, shuffle=True))
    trainer.test(model, DataLoader(Digits(train=False), 256), verbose=False)
    results = audit.results["test"]
    for variant, result in results.items():
        print(f"{variant}: {result}")
    print(f"Report: {Report.read(options.folder).path}")
    if options.picture is not None:
        curves(results, "mark", "false_positive_rate").savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
