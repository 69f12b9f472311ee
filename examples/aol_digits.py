"""AOL-FC and AOL-Conv of the paper, at small width, on scikit-learn's digits, through an ordinary LightningModule.

python examples/aol_digits.py                             # both networks, certified accuracy at the end
python examples/aol_digits.py --picture docs/aol.svg      # and draw it
"""

from __future__ import annotations

import argparse
import logging
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits import digits
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from groundwire import Plugins
from groundwire_aol import AOL, AOLConv2d, AOLLinear, MaxMin, OffsetCrossEntropy


class FirstChannels(nn.Module):
    """The first of the channels: the paper's class head, and how it narrows."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return x[:, : self.n]


def fully_connected(width=256, layers=8):
    """Eight dense layers of four times the pixels, MaxMin between them; the first ten outputs are the scores."""
    widths = [64, *[width] * layers]
    steps = [m for i, o in pairwise(widths) for m in (AOLLinear(i, o), MaxMin())]
    return nn.Sequential(nn.Flatten(), *steps[:-1], FirstChannels(10))


def convolutional(base=8, layers=5):
    """Blocks of five 3 x 3 layers; where the image is halved, its pixels become channels, four times as many."""
    steps, width = [AOLConv2d(1, base, 1)], base
    for _ in range(2):
        steps += [m for _ in range(layers) for m in (AOLConv2d(width, width, 3, padding=1), MaxMin())] + [
            nn.PixelUnshuffle(2)
        ]
        width *= 4
    return nn.Sequential(*steps, AOLConv2d(width, width, 2), nn.Flatten(), FirstChannels(10))


NETWORKS = {"AOL-FC": fully_connected, "AOL-Conv": convolutional}


class Classifier(pl.LightningModule):
    def __init__(self, net, mean, lr=0.1, offset=0.35):
        super().__init__()
        self.net, self.mean, self.lr = net, mean, lr
        self.loss = OffsetCrossEntropy(offset, temperature=0.25)

    def forward(self, x):
        return self.net(x - self.mean)  # subtracting a constant changes no distance

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(net, data, epochs, folder):
    callback = AOL(eps=(36 / 255, 72 / 255, 108 / 255, 1.0))
    loaders = DataLoader(data.train, 64, shuffle=True), DataLoader(data.test, 256)
    trainer = pl.Trainer(
        max_epochs=epochs, check_val_every_n_epoch=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Plugins([callback], report_dir=folder)],
    )  # fmt: skip
    trainer.fit(Classifier(net, float(data.train.tensors[0].mean())), *loaders)
    return callback.results["validate"]


def draw(results, path):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results.items():
        axes.plot(*zip(*result.curve, strict=True), label=name)
    axes.set(
        xlabel="radius (L2, pixels in [0, 1])", ylabel="certified accuracy", ylim=(0, 1), title="scikit-learn digits"
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with rc_context({"svg.hashsalt": "aol"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def show(results):
    radii = next(iter(results.values())).certified
    table = Table(
        "network",
        "clean",
        *(f"at {eps:.3f}" for eps in radii),
        "Lipschitz constant at most",
        title="Certified accuracy",
    )
    for name, result in results.items():
        shares = (f"{value:.3f}" for value in (result.clean, *result.certified.values()))
        table.add_row(name, *shares, f"{result.lipschitz:.7f}")
    Console().print(table)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=256, help="of AOL-FC")
    parser.add_argument("--picture", type=Path, help="draw certified accuracy over the radius here (.svg or .png)")
    parser.add_argument("--report", type=Path, default=Path("groundwire-aol"), help="folder of the report pages")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data, results = digits(options.seed), {}
    for name, make in NETWORKS.items():
        pl.seed_everything(options.seed, verbose=False)
        net = make(options.width) if make is fully_connected else make()
        results[name] = train(net, data, options.epochs, options.report / name)
    show(results)
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
