"""Fit with CrAM and prune, in an environment that holds nothing but its wheel and what that one asks for."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundwire
import groundwire_cram
from groundwire_cram import CrAM, prune


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(callbacks):
    pl.seed_everything(0)
    net, data = Net(), TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, callbacks=callbacks, **options).fit(net, DataLoader(data, 16))
    return net


for package in (groundwire, groundwire_cram):
    assert "site-packages" in package.__file__, f"{package.__file__} is not the installed wheel"
plain, cram = fitted([]), fitted([CrAM(sparsities=(0.5, 0.9))])
assert not torch.equal(plain.layers[0].weight, cram.layers[0].weight), "CrAM changed nothing"
zeros = sum(int((p == 0).sum()) for p in prune(cram, 0.9).parameters() if p.dim() > 1)
assert zeros == 126, f"{zeros} of 140 weights are zero, expected 126"
print(f"groundwire {groundwire.__version__}: fitted with CrAM, {zeros} of 140 weights pruned")
