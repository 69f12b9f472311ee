"""A classifier and data sets over a table of clinics, as users write them."""

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Net(pl.LightningModule):
    """A linear classifier whose step takes whatever its data set gives; it remembers the sources that it saw."""

    def __init__(self, inputs=5):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(inputs, 4)
        self.net = nn.Linear(4, 2)
        self.seen, self.steps = set(), None

    def forward(self, x):
        return self.net(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, y, *rest = batch.values() if isinstance(batch, dict) else batch
        meta = rest[0] if rest and isinstance(rest[0], dict) else {"source": rest[-1] if rest else []}
        self.seen.update(str(s.item() if hasattr(s, "item") else s) for s in meta["source"])
        return nn.functional.cross_entropy(self(x.float().flatten(1)), y)

    validation_step = test_step = training_step

    def configure_optimizers(self):
        self.steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 1e-3)


class Rows(Dataset):
    """Rows as (x, y, meta), or as dicts."""

    def __init__(self, data, as_dict=False):
        self.data, self.as_dict, self.clinics = data, as_dict, list(data.source)

    def __len__(self):
        return len(self.data.y)

    def __getitem__(self, i):
        d = self.data
        row = torch.tensor(d.X[i]), int(d.y[i]), {"groups": int(d.a[i]), "source": str(d.source[i])}
        return {"x": row[0], "y": row[1], **row[2]} if self.as_dict else row


def tensors(data):
    number = np.array([int(s[-1]) for s in data.source])
    return TensorDataset(*map(torch.tensor, (data.X, data.y, data.a, number)))


def fit(kit, dataset, flea, module=None, **options):
    module = module or Net()
    loader = dataset if isinstance(dataset, DataLoader) else DataLoader(dataset, 32, shuffle=True)
    trainer = kit.fit(module, *([flea] if isinstance(flea, pl.Callback) else flea), loader=loader, **options)
    return trainer, module


GOOD = {"clinic 0", "clinic 2", "clinic 4"}
