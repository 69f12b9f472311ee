"""Forecast and fit with LIMES, in an environment that holds nothing but its wheel, core and what these ask for."""

import sys

from groundwire_limes import PriorExtrapolator

assert "torch" not in sys.modules, "forecasting imported torch"
extrapolator = PriorExtrapolator(3)
extrapolator.update(0, [1, 2, 3])
assert abs(extrapolator.forecast(1).sum() - 1) < 1e-12

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import groundwire_limes  # noqa: E402
from groundwire_limes import LIMES  # noqa: E402


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


assert "site-packages" in groundwire_limes.__file__, f"{groundwire_limes.__file__} is not the installed wheel"
pl.seed_everything(0)
net, x, y = Net(), torch.randn(64, 4), torch.randint(3, (64,))
rows = [{"x": x[i], "y": y[i], "time": i // 16 * 3600} for i in range(64)]
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
pl.Trainer(max_epochs=1, callbacks=[LIMES(time="time")], **options).fit(net, DataLoader(rows, 16))
assert list(net.state_dict()) == list(Net().state_dict())
print("groundwire-limes: fitted with LIMES on a stream of four hours")
