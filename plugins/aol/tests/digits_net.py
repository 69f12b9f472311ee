"""A small network on digits that the tests of the callback share."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire_aol import OffsetCrossEntropy


def images(rows=96):
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:rows] / 16).float().view(-1, 1, 8, 8), torch.tensor(y[:rows]))


class Net(pl.LightningModule):
    def __init__(self, late=False):
        super().__init__()
        self.late = late
        self.loss = OffsetCrossEntropy(0.4)
        if not late:
            self.build()

    def build(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )

    def configure_model(self):
        if self.late and not hasattr(self, "net"):
            self.build()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def fit(kit, module, *callbacks, val=True, **options):
    loader = DataLoader(images(), 16)
    return kit.fit(module, *callbacks, loader=loader, val=loader if val else None, **{"max_epochs": 2, **options})
