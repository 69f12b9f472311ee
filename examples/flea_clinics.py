"""Five clinics share a table of patients, two of them manipulated: train with and without FLEA.

The table is scikit-learn's breast-cancer data. It has no sensitive attribute, so the half of the patients whose worst
texture is above the median plays that role. Two clinics have swapped the groups of all their patients.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire_flea import FLEA, DemographicParityLoss, FLEAWarning
from groundwire_flea.corruptions import corrupt
from groundwire_flea.report import distances_figure, scores_figure

CLINICS, MANIPULATED = 5, (1, 3)
FEATURES = [0, 1, 4, 8]  # radius, texture, smoothness, symmetry


class Classifier(pl.LightningModule):
    """A linear classifier that is made fair with respect to the groups that the data tell."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.net = nn.Linear(inputs, 1)
        self.loss = DemographicParityLoss(strength=2.0)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y, groups, _clinic = batch
        return self.loss(self(x), y, groups=groups)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


def patients(seed: int) -> tuple[TensorDataset, tuple[torch.Tensor, ...]]:
    """Training rows of the clinics after the manipulation, and clean test rows."""
    x, y = load_breast_cancer(return_X_y=True)
    groups = (x[:, 21] > np.median(x[:, 21])).astype(int)
    x = np.column_stack([(x[:, FEATURES] - x[:, FEATURES].mean(0)) / x[:, FEATURES].std(0), groups])
    order = np.random.default_rng(seed).permutation(len(y))
    train, test = order[:-114], order[-114:]
    bad = corrupt(
        x[train],
        y[train],
        sensitive_features=groups[train],
        sources=np.arange(len(train)) % CLINICS,
        malicious=MANIPULATED,
        adversary="flip_protected",
    )
    columns = (torch.tensor(bad.X).float(), bad.y, bad.sensitive_features, bad.sources)
    held_out = torch.tensor(x[test]).float(), torch.tensor(y[test]), torch.tensor(groups[test])
    return TensorDataset(*map(torch.as_tensor, columns)), held_out


def train(data: TensorDataset, epochs: int, seed: int, callbacks: Sequence[pl.Callback]) -> Classifier:
    pl.seed_everything(seed, verbose=False)
    model = Classifier(data.tensors[0].shape[1])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **options
    )
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    return model


def quality(model: Classifier, test: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Accuracy, and the difference between groups in positive predictions, on clean rows."""
    x, y, groups = test
    with torch.no_grad():
        positive = model(x).squeeze(-1) >= 0
    gap = positive[groups == 0].float().mean() - positive[groups == 1].float().mean()
    return float((positive == y).float().mean()), float(gap.abs())


def main(arguments: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw flea_*.svg there")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available|logging interval).*")
    warnings.filterwarnings("ignore", category=FLEAWarning)
    found: dict[str, list[tuple[float, float]]] = {"all clinics": [], "clinics that FLEA kept": []}
    for seed in range(options.seeds):
        data, test = patients(seed)
        flea = FLEA(source=3, groups=2)
        for name, callbacks in zip(found, ([], [flea]), strict=True):
            found[name].append(quality(train(data, options.epochs, seed, callbacks), test))
    table = Table("trained on", "accuracy", "gap between groups", title=f"Clean test rows, {options.seeds} seeds")
    for name, values in found.items():
        mean, spread = np.mean(values, axis=0), np.std(values, axis=0)
        table.add_row(name, *(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True)))
    Console().print(table)
    Console().print(f"Last seed: kept {flea.decision.named(True)}, suppressed {flea.decision.named(False)}")
    if options.pictures is not None:
        draw(flea, options.pictures)
    return {name: np.array(values) for name, values in found.items()}


def draw(flea: FLEA, folder: Path) -> None:
    """The report's pictures as files that do not change when nothing changed."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "flea"}):
        for name, figure in {"scores": scores_figure, "distances": distances_figure}.items():
            figure(flea.decision).savefig(folder / f"flea_{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
