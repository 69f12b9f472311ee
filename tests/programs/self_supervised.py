"""Programs that learn without labels: BYOL with a teacher that follows, and contrast against a queue."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import torch
from programs_harness import Program, Refused
from torch import nn
from torch.nn import functional as F


def views(x):
    """Two random versions of each image."""
    return [torch.roll(x, int(torch.randint(-1, 2, ())), dims=3) + 0.1 * torch.randn_like(x) for _ in range(2)]


def projector(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, outputs))


class BYOL(pl.LightningModule):
    """The teacher is a deep copy without gradients; it follows by momentum when a batch is over."""

    def __init__(self, momentum=0.9):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.projection = projector(24, 8)
        self.prediction = projector(8, 8)
        self.teacher_backbone, self.teacher_projection = copy.deepcopy(self.backbone), copy.deepcopy(self.projection)
        for parameter in [*self.teacher_backbone.parameters(), *self.teacher_projection.parameters()]:
            parameter.requires_grad = False

    def forward(self, x):
        return self.backbone(x)

    def teach(self, x):
        with torch.no_grad():
            return self.teacher_projection(self.teacher_backbone(x))

    def loss(self, batch):
        first, second = views(batch[0])
        p, q = (self.prediction(self.projection(self.backbone(v))) for v in (first, second))
        z, w = self.teach(first), self.teach(second)
        return -0.5 * (F.cosine_similarity(p, w).mean() + F.cosine_similarity(q, z).mean())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        pairs = zip(
            [*self.backbone.parameters(), *self.projection.parameters()],
            [*self.teacher_backbone.parameters(), *self.teacher_projection.parameters()],
            strict=True,
        )
        for student, teacher in pairs:
            teacher.mul_(self.hparams.momentum).add_(student, alpha=1 - self.hparams.momentum)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.06, momentum=0.9)


PROGRAMS = {
    "BYOL": Program(
        BYOL,
        draws=True,
        groups=lambda batch: batch[1] % 2,
        plugins=dict.fromkeys(("AOL", "LIMES", "BiasAudit"), Refused("which layer of BYOL", "Plugins(head=...)")),
    ),
}
