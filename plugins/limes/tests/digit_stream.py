"""What the tests of the callback share: digits whose mix moves, in the order of time, and a model for them."""

from functools import cache

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from groundwire.modules import shift_hooks
from groundwire_limes import StreamDataModule

HOUR = 3600


@cache
def stream(hours=12, rows=40, classes=10, seed=0):
    """Digits whose mix has a period of four hours; rows in the order of time."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    keep = y < classes
    x, y = x[keep] / 16, y[keep]
    picked, times = [], []
    for hour in range(hours):
        prior = np.exp(1.5 * np.cos(np.pi * hour / 2 + np.arange(classes)))
        for k in rng.choice(classes, rows, p=prior / prior.sum()):
            picked.append(rng.choice(np.flatnonzero(y == k)))
            times.append(hour * HOUR + 10 * len(picked) % HOUR)
    times = np.sort(np.asarray(times) // HOUR * HOUR + np.arange(len(times)) % 100)
    data = TensorDataset(torch.tensor(x[picked], dtype=torch.float32), torch.tensor(y[picked]))
    return data, times


def module_of(hours=12, batch_size=20, **options):
    data, times = stream(hours, **options)
    return StreamDataModule(data, times, batch_size=batch_size)


def across_hours(datamodule):
    """The stream with batches that begin in one hour and end in the next."""
    rows = np.concatenate(datamodule.batches())
    datamodule.batches = lambda: np.split(rows, range(7, len(rows), 20))
    return datamodule


class Digits(pl.LightningModule):
    def __init__(self, classes=10):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen = self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def offset_on(layer):
    """What LIMES adds to the scores of ``layer`` now."""
    [hook] = shift_hooks(layer)
    return (hook.vector if hook.rows is None else hook.rows).detach().clone()


class Spy(pl.Callback):
    """What corrects each training batch."""

    def __init__(self):
        self.offsets = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.offsets.append(offset_on(pl_module.get_submodule("net.2")))


def fit(kit, limes, datamodule=None, module=None, **options):
    """A Trainer that fitted, the module, and a spy on its offsets."""
    module, spy = module or Digits(), Spy()
    trainer = kit.trainer(limes, spy, **options)
    trainer.fit(module, datamodule=datamodule or module_of())
    return trainer, module, spy


def labels_by_hour(datamodule):
    found = {}
    for batch in datamodule.train_dataloader():
        hour = int(batch[2]["timestamp"][0]) // HOUR
        found[hour] = found.get(hour, 0) + np.bincount(batch[1].numpy(), minlength=10)
    return found


def data_of(loader):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader

    return Data()


class Listed:
    """Batches as they are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def rows_at(times, labels=None):
    labels = [0] * len(times) if labels is None else labels
    return [(torch.zeros(4, 64), torch.full((4,), y), {"timestamp": t}) for t, y in zip(times, labels, strict=True)]
