"""Programs that change how Lightning trains: scalers, several optimizers, edited gradients, averaged weights."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from programs_harness import Program, Refused
from torch import nn
from torch.nn import functional as F


class Classifier(pl.LightningModule):
    """What the programs of this file begin with."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(54, 4)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.log_dict({"val_loss": F.cross_entropy(scores, batch[1]), "val_acc": _accuracy(scores, batch[1])})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def _accuracy(scores, labels):
    return (scores.argmax(1) == labels).float().mean()


class SimulatedScaler(MixedPrecision):
    """A real gradient scaler around bfloat16: half precision needs another machine."""

    def __init__(self):
        super().__init__("bf16-mixed", "cpu")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)


class TwoOptimizers(pl.LightningModule):
    """One net predicts, the other one how far off that is; each has an optimizer, and they take turns."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.mean = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.spread = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.mean(x)

    def mean_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def spread_loss(self, batch):
        with torch.no_grad():
            residual = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return F.mse_loss(self.spread(batch[0]).squeeze(1), residual)

    def training_step(self, batch, batch_idx):
        losses = {"mean_loss": self.mean_loss, "spread_loss": self.spread_loss}
        for optimizer, (name, loss_of) in zip(self.optimizers(), losses.items(), strict=True):
            loss = loss_of(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log(name, loss)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": self.mean_loss(batch), "val_spread": self.spread_loss(batch)})

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.mean, self.spread)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]


def both_losses(module, batch):
    """No parameter is in both losses, so one function serves both optimizers."""
    return module.mean_loss(batch) + module.spread_loss(batch)


class FrozenRow(Classifier):
    """The row of class 1 keeps its values: its gradient is zeroed after each backward."""

    def on_after_backward(self):
        self.head.weight.grad[1] = 0


class EverySecondStep(Classifier):
    """Gradients are zeroed at every second step only, so that a batch counts again in the next one."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class Compiled(Classifier):
    """The backbone is compiled, the module is not."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.compile(self.backbone, backend="eager")


class Finetuned(Classifier):
    """The backbone joins when the head has learned for an epoch."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def odd(batch):
    return batch[1] % 2


PROGRAMS = {
    "gradient scaler": Program(Classifier, options=lambda: {"plugins": [SimulatedScaler()]}, groups=odd),
    "gradient accumulation": Program(
        Classifier, options=lambda: {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}, groups=odd
    ),
    "two optimizers": Program(TwoOptimizers, loss_fn=both_losses, groups=odd),
    # AOL computes the weights of its layers, so the user's own hook finds no gradient at ``head.weight``.
    "a gradient row zeroed": Program(FrozenRow, groups=odd, plugins={"AOL": None}),
    "gradients zeroed every second step": Program(EverySecondStep, groups=odd),
    "a compiled part": Program(
        Compiled, groups=odd, plugins={"AOL": Refused("OptimizedModule", "compile the model after the conversion")}
    ),
    "BackboneFinetuning": Program(
        Finetuned, callbacks=lambda: [BackboneFinetuning(1, lambda _: 1.5, backbone_initial_lr=0.01)], groups=odd
    ),
    "EMA": Program(
        Classifier,
        callbacks=lambda: [EMAWeightAveraging(decay=0.9)],
        groups=odd,
        plugins={"ACDC": Refused("EMAWeightAveraging puts an average", "leave it out")},
    ),
    "SWA": Program(
        Classifier,
        callbacks=lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)],
        groups=odd,
        plugins={"ACDC": Refused("StochasticWeightAveraging puts an average", "leave it out")},
    ),
}
