"""Convert and fit with AOL, in an environment that holds nothing but its wheel, core and what these ask for."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundwire_aol
from groundwire import export
from groundwire_aol import AOL, OffsetCrossEntropy, lipschitz_bound


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))
        self.loss = OffsetCrossEntropy(offset=0.5, temperature=0.25)

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch):
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


assert "site-packages" in groundwire_aol.__file__, f"{groundwire_aol.__file__} is not the installed wheel"
pl.seed_everything(0)
net, data = Net(), TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
pl.Trainer(max_epochs=1, callbacks=[AOL()], **options).fit(net, DataLoader(data, 16))
bound = float(lipschitz_bound(export(net).layers, torch.zeros(1, 4)))
assert bound <= 1.000001, f"the bound is {bound}"
print(f"groundwire-aol: fitted with AOL, Lipschitz constant at most {bound:.6f}")
