"""Breast cancer data with a group that nothing depends on, and a module that knows no plugin."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from groundwire_bias_audit import audit


class Patients(Dataset):
    """Breast cancer data; the group is whether the patient's id is odd, which nothing depends on."""

    def __init__(self, rows=slice(None), form="meta"):
        x, y = load_breast_cancer(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        self.x, self.y = torch.tensor(x, dtype=torch.float32)[rows], torch.tensor(y)[rows]
        self.hospital = np.array(["north", "south", "west"])[np.arange(len(x)) % 3][rows]
        self.form = form

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        if self.form == "meta":
            return self.x[i], self.y[i], {"groups": self.hospital[i]}
        if self.form == "dict":
            return {"x": self.x[i], "y": self.y[i], "hospital": self.hospital[i], "id": f"p{i}"}
        return self.x[i], self.y[i]


class Classifier(pl.LightningModule):
    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        scores = self(x)
        if scores.shape[1] > 1:
            return nn.functional.cross_entropy(scores, y)
        return nn.functional.binary_cross_entropy_with_logits(scores[:, 0], y.float())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["y"] if isinstance(batch, dict) else batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def loaders(form="meta", batch=64, shuffle=False):
    data = Patients(form=form)
    return DataLoader(data, batch, shuffle=True), DataLoader(data, batch, shuffle=shuffle)


def fitted(kit, plugin, form="meta", outputs=1, epochs=1, shuffle=False, **options):
    module = Classifier(outputs)
    train, val = loaders(form, shuffle=shuffle)
    trainer = kit.trainer(plugin, max_epochs=epochs, **options)
    trainer.fit(module, train, val)
    return module, trainer


def expected(module, variant=None, data=None):
    data = data or Patients()
    with torch.no_grad():
        scores = module.eval()(data.x)
    p = scores.sigmoid()[:, 0] if scores.shape[1] == 1 else scores.softmax(1)[:, 1]
    return audit(data.y, p, sensitive_features=pd.Series(data.hospital, name="group"))


def assert_same(found, wanted):
    exact = [c for c in wanted.columns if c not in ("roc_auc", "calibration_error")]
    assert found.index.tolist() == wanted.index.tolist()
    assert (found[exact].fillna(-1) == wanted[exact].fillna(-1)).all().all()
    # In a bin of width 1/1000 scores are ties; a model that is unsure has many of them.
    assert (found["roc_auc"] - wanted["roc_auc"]).abs().max() < 5e-3
    assert (found["calibration_error"] - wanted["calibration_error"]).abs().max() < 1e-6


SHUFFLED = pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
