"""Programs on tables: several labels a row, and batches that are tuples with methods."""

from __future__ import annotations

from typing import NamedTuple

import lightning.pytorch as pl
import torch
from programs_harness import BATCH, ROWS, Program, Refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import BinaryAUROC, MultilabelF1Score

from groundwire import Fields


def table(rows, seed, labels=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    weights = torch.linspace(-1, 1, 8 * labels).reshape(8, labels)
    return x, (x @ weights + 0.5 * torch.randn(rows, labels, generator=generator) > 0).long()


class MultiLabel(pl.LightningModule):
    """Four labels a row, rare ones weighted by a buffer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 4))
        self.loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 1.5, 1.0]))
        self.f1 = MultilabelF1Score(num_labels=4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        loss = self.loss(self(x), y.float())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        x, y = batch
        scores = self(x)
        self.f1.update(scores.sigmoid(), y)
        self.log("val_f1", self.f1)
        self.log("val_loss", self.loss(scores, y.float()))

    def configure_optimizers(self):
        optimizer = torch.optim.NAdam(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)}


class Patients(NamedTuple):
    """A batch: columns with names, and what follows from them."""

    numbers: Tensor
    kind: Tensor
    label: Tensor

    def noisy(self, scale):
        return self._replace(numbers=self.numbers + scale * torch.randn_like(self.numbers))

    @property
    def size(self):
        return len(self.label)


class PatientTable(Dataset):
    def __init__(self, rows, seed):
        self.x, self.y = table(rows, seed)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return Patients(self.x[i], (self.x[i, 0] > 0).long() + 2 * (self.x[i, 1] > 0).long(), self.y[i, 0])


class TabularNet(pl.LightningModule):
    """Numbers and an embedded category; one score a row."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
        self.auroc = BinaryAUROC()

    def forward(self, batch):
        return self.net(torch.cat([batch.numbers, self.embedding(batch.kind)], dim=1)).squeeze(1)

    def training_step(self, batch, batch_idx):
        loss = F.binary_cross_entropy_with_logits(self(batch.noisy(0.1)), batch.label.float())
        self.log("train_loss", loss, batch_size=batch.size)
        return loss

    def validation_step(self, batch, batch_idx):
        scores = self(batch)
        self.auroc(scores, batch.label)
        self.log("val_auroc", self.auroc, on_epoch=True, batch_size=batch.size)

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


def loaders_of(train, validation):
    return DataLoader(train, BATCH, shuffle=True), DataLoader(validation, BATCH)


PROGRAMS = {
    "multi-label": Program(
        MultiLabel,
        lambda: loaders_of(TensorDataset(*table(ROWS, 1, 4)), TensorDataset(*table(32, 2, 4))),
        groups=lambda batch: batch[0][:, 0] > 0,
        plugins={
            "AOL": Refused("LayerNorm has no known Lipschitz constant", "BatchCentering"),
            "LIMES": Refused("targets of shape (16, 4)", "Plugins(fields="),
            "FLEA": Refused("label has 4 values a row, not one"),
        },
    ),
    "NamedTuple batches": Program(
        TabularNet,
        lambda: loaders_of(PatientTable(ROWS, 1), PatientTable(32, 2)),
        fields=lambda batch: Fields(batch, batch.label) if isinstance(batch, Patients) else None,
        groups=lambda batch: batch.kind,
        plugins={
            "AOL": Refused("Embedding has no known Lipschitz constant", "certify the part behind it"),
            "FLEA": Refused("inputs of type Patients are no numbers", "embed="),
        },
    ),
}
