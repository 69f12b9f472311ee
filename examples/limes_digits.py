"""Digits whose mix follows the hour of the day: a small network with and without LIMES.

python examples/limes_digits.py                              # accuracy before learning, and a report page
python examples/limes_digits.py --picture docs/limes.svg     # and draw both networks and what was forecast
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from groundwire import Plugins
from groundwire_limes import LIMES, PriorExtrapolator, StreamDataModule

HOUR, DAY, CLASSES = 3600, 24, 10


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        self.hits, self.rows = Counter(), Counter()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y, meta = batch
        scores = self(x)
        hour = int(meta["timestamp"][0]) // HOUR
        self.hits[hour] += int((scores.argmax(dim=1) == y).sum())
        self.rows[hour] += len(y)
        return nn.functional.cross_entropy(scores, y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def stream(days: int, rows_per_hour: int, seed: int = 0) -> StreamDataModule:
    """Noisy digits; each class is more frequent at another time of the day."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    size, phase = rng.uniform(0.8, 1.8, CLASSES), rng.uniform(0, 2 * np.pi, CLASSES)
    picked = []
    for hour in range(DAY * days):
        prior = np.exp(size * np.cos(2 * np.pi * hour / DAY + phase))
        classes = rng.choice(CLASSES, rows_per_hour, p=prior / prior.sum())
        picked += [rng.choice(np.flatnonzero(y == k)) for k in classes]
    noisy = (x[picked] + 7 * rng.standard_normal((len(picked), 64))) / 16
    rows = TensorDataset(torch.tensor(noisy, dtype=torch.float32), torch.tensor(y[picked]))
    return StreamDataModule(rows, np.repeat(np.arange(DAY * days) * HOUR, rows_per_hour), batch_size=100)


def fit(data: StreamDataModule, folder: Path, *callbacks: pl.Callback) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(model, datamodule=data)
    return model


def forecasts(limes: LIMES) -> tuple[np.ndarray, np.ndarray]:
    """Realised shares of the classes by hour, (hours, K), and what was expected of each hour before it came."""
    counts = np.array(limes.extrapolator.state_dict()["counts"])
    again, expected = PriorExtrapolator(CLASSES, period=DAY), []
    for hour, row in enumerate(counts):
        expected.append(again.forecast(hour))
        again.update(hour, row)
    return counts / counts.sum(axis=1, keepdims=True), np.array(expected)


def draw(models: dict[str, Classifier], limes: LIMES, path: Path) -> None:
    """Accuracy by hour above; shares of two digits and their forecasts below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for name, model in models.items():
        hours = sorted(model.rows)
        above.plot(hours, [100 * model.hits[h] / model.rows[h] for h in hours], label=name)
    above.set(ylabel="right before learning, %", title="scikit-learn digits with noise; the mix follows the hour")
    realised, expected = forecasts(limes)
    for digit in np.argsort(-np.ptp(realised, axis=0))[:2]:
        [line] = below.plot(realised[:, digit], linewidth=1, label=f"digit {digit}")
        below.plot(expected[:, digit], "--", linewidth=1, color=line.get_color())
    below.set(xlabel="hour", ylabel="share of labels", title="realised (lines) and forecast (dashes)")
    for axes in (above, below):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(ncols=3, loc="lower right" if axes is above else "upper right", fontsize="small")
    with rc_context({"svg.hashsalt": "limes", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--rows", type=int, default=500, help="rows in an hour")
    parser.add_argument("--out", type=Path, default=Path("groundwire-limes"))
    parser.add_argument("--picture", type=Path, help="draw both networks and the forecasts here (.svg or .png)")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available).*")
    data = stream(options.days, options.rows)
    limes = LIMES()
    ways = {"without": (), "with LIMES": (Plugins([limes], report_dir=options.out),)}
    models = {name: fit(data, options.out, *callbacks) for name, callbacks in ways.items()}
    found = {name: model.hits.total() / model.rows.total() for name, model in models.items()}
    for name, accuracy in found.items():
        print(f"{name:12} {100 * accuracy:.1f} % right before learning")
    if options.picture:
        draw(models, limes, options.picture)
    print(f"Report with pictures: {options.out / 'report.html'}")
    return found


if __name__ == "__main__":
    main()
