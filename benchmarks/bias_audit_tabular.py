"""COMPAS and German credit from CSV files to a report: a Lightning MLP trained with CrAM, pruned, and audited."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from measure import Row
from torch import nn
from torch.utils.data import DataLoader, Dataset

from groundwire_bias_audit import BiasAudit
from groundwire_cram import CrAM


@dataclass(frozen=True)
class Source:
    """Where a data set is and what its columns mean."""

    file: str
    label: Callable[[pd.DataFrame], pd.Series]
    groups: tuple[str, ...]
    numbers: tuple[str, ...]
    words: tuple[str, ...]


DATA_SETS = {
    "COMPAS": Source(
        "compas-nonames.csv",
        lambda table: table["two_year_recid"],
        ("race", "sex"),
        ("age", "juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count"),
        ("c_charge_degree", "age_cat"),
    ),
    "German": Source(
        "german_credit_data.csv",
        lambda table: (table["Risk"] == "good").astype(int),
        ("Sex",),
        ("Age", "Job", "Credit amount", "Duration"),
        ("Housing", "Saving accounts", "Checking account", "Purpose"),
    ),
}


class Persons(Dataset[Any]):
    """Rows of a table as ``{"x", "y", "id"}``; the groups stay in a table of their own, joined by id."""

    def __init__(self, x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
        self.x, self.y, self.ids = torch.tensor(x, dtype=torch.float32), torch.tensor(y), ids

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "y": self.y[i], "id": int(self.ids[i])}


def read(folder: Path, source: Source, seed: int = 0) -> tuple[Persons, Persons, pd.DataFrame]:
    """Training and test rows (half each), and the groups by id."""
    path = folder / source.file
    if not path.is_file():
        raise SystemExit(f"there is no {path}: --data needs a folder with {source.file}")
    table = pd.read_csv(path)
    numbers = table[list(source.numbers)].astype(float)
    numbers = (numbers - numbers.mean()) / numbers.std()
    words = pd.get_dummies(table[list(source.words)].astype("object").fillna("none")).astype(float)
    x, y = pd.concat([numbers.fillna(0), words], axis=1).to_numpy(), source.label(table).to_numpy()
    order = np.random.default_rng(seed).permutation(len(table))
    parts = [Persons(x[rows], y[rows], rows) for rows in np.array_split(order, 2)]
    return parts[0], parts[1], table[list(source.groups)]


class Mlp(pl.LightningModule):
    """Two hidden layers and one score."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch["x"])[:, 0], batch["y"].float())

    def test_step(self, batch, batch_idx):
        self(batch["x"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)


def run(name: str, data: Path, folder: Path, epochs: int) -> tuple[BiasAudit, Path]:
    """Train, prune and audit; the audit and its report page."""
    train, test, groups = read(data, DATA_SETS[name])
    torch.manual_seed(0)
    audit = BiasAudit(groups)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[CrAM(sparsities=(0.5, 0.8, 0.95), rho=0.01), audit], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder / name,
    )  # fmt: skip
    model = Mlp(train.x.shape[1])
    trainer.fit(model, DataLoader(train, 64, shuffle=True))
    trainer.test(model, DataLoader(test, 512), verbose=False)
    page = sorted((folder / name).glob("groundwire/*/report.html"))[-1]
    return audit, page


def end_to_end(data: Path, folder: Path | None, epochs: int) -> list[Row]:
    """Accuracy, gaps and flips of both data sets, dense and pruned."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in DATA_SETS:
            audit, page = run(name, data, folder or Path(scratch), epochs)
            print(f"{name}: {page if folder else 'report written'}; {page.read_text('utf-8').count('<svg')} figures")
            for version, result in audit.results["test"].items():
                print(f"  {version}: {result}")
                rows.append(Row(f"{name}, {version}: accuracy", "", [float(result.to_frame([])["accuracy"].iloc[0])]))
                worst = max(t.gap for t in result.tests if not np.isnan(t.gap))
                rows.append(Row(f"{name}, {version}: largest gap", "", [worst]))
    return rows
