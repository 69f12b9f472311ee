"""A program on time series: several loaders in training and in validation, a recurrent net, a regression."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from programs_harness import BATCH, Program, Refused
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.regression import MeanSquaredError


def waves(rows, seed, period):
    """Windows of twelve values and the two that follow."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(rows, 1, generator=generator)
    series = torch.sin(phase + torch.arange(14) * 6.28 / period) + 0.05 * torch.randn(rows, 14, generator=generator)
    return TensorDataset(series[:, :12, None], series[:, 12:])


class Forecaster(pl.LightningModule):
    """Two series of different length are learned side by side; each is validated by itself."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 12, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(12, 2)
        self.errors = nn.ModuleList(
            [MetricCollection([MeanAbsoluteError(), MeanSquaredError()], postfix=f"_{name}") for name in ("a", "b")]
        )
        self.outputs = []

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])

    def training_step(self, batch, batch_idx):
        losses = {name: F.huber_loss(self(x), y) for name, (x, y) in batch.items()}
        self.log_dict({f"train_{name}": loss for name, loss in losses.items()}, on_step=False, on_epoch=True)
        loss = sum(losses.values())
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.log("train_mean", torch.stack(self.outputs).mean())
        self.outputs.clear()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        forecast = self(x)
        self.errors[dataloader_idx].update(forecast, y)
        self.log("val_loss", F.huber_loss(forecast, y))

    def on_validation_epoch_end(self):
        for errors in self.errors:
            self.log_dict(errors.compute())
            errors.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), lr=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def several_loaders():
    train = {
        "a": DataLoader(waves(64, 1, 7), BATCH, shuffle=True),
        "b": DataLoader(waves(48, 2, 11), BATCH, shuffle=True),
    }
    return train, [DataLoader(waves(32, 3, 7), BATCH), DataLoader(waves(16, 4, 11), BATCH)]


PROGRAMS = {
    "forecasting with several loaders": Program(
        Forecaster,
        several_loaders,
        lambda: {"gradient_clip_val": 1.0},
        groups=lambda batch: batch[0][:, 0, 0] > 0,
        plugins={
            "AOL": Refused("LSTM has no known Lipschitz constant"),
            "LIMES": Refused("keys ['a', 'b']", "Plugins(fields="),
            "BiasAudit": Refused("is none of the 2 classes", "BiasAudit(task=...)"),
            "FLEA": Refused("training rows of a dict", "use one DataLoader"),
        },
    ),
}
