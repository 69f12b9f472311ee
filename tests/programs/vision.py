"""Programs on images: a classifier of the usual project template, and a segmentation."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import torch
from programs_harness import BATCH, IMAGES, ROWS, Program, Refused, Works
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import JaccardIndex, MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import Accuracy, MulticlassF1Score


class ConvNet(nn.Module):
    """A backbone of its own file, as a configuration would name it."""

    def __init__(self, classes=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1)
        )
        self.classifier = nn.Linear(8 * 16, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class TemplateClassifier(pl.LightningModule):
    """Metrics live in the module and are logged as objects; optimizer and scheduler come from outside, partially made.

    The loss is a metric too, so a graph hangs on it for a moment: such a module cannot be deep-copied in between.
    """

    def __init__(self, net, optimizer, scheduler):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
        self.train_acc = Accuracy(task="multiclass", num_classes=4)
        self.val_metrics = MetricCollection(
            {"acc": Accuracy(task="multiclass", num_classes=4), "f1": MulticlassF1Score(4)}, prefix="val/"
        )
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x):
        return self.net(x)

    def on_train_start(self):
        self.val_loss.reset()
        self.val_metrics.reset()
        self.val_acc_best.reset()

    def model_step(self, batch):
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), logits.argmax(dim=1), y

    def training_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/acc", self.train_acc, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_metrics.update(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self):
        found = self.val_metrics.compute()
        self.log_dict(found)
        self.val_metrics.reset()
        self.val_acc_best(found["val/acc"])
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


def template_classifier():
    return TemplateClassifier(
        ConvNet(),
        partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-4),
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1, patience=0),
    )


class Scenes(Dataset):
    """Images, and for each pixel ink, paper, or 255 at the border, which nobody labelled."""

    def __init__(self, first, last):
        self.images = IMAGES[first:last]
        self.masks = (self.images[:, 0] > 0.4).long()
        self.masks[:, 0], self.masks[:, -1] = 255, 255

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.masks[i]


class Segmentation(pl.LightningModule):
    """A small U-Net: skip connections, a transposed convolution, and pixels without a label."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 2, 1)
        self.loss = nn.CrossEntropyLoss(ignore_index=255)
        self.iou = JaccardIndex("multiclass", num_classes=2, ignore_index=255)

    def forward(self, x):
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.bottom(skip))], dim=1))

    def training_step(self, batch, batch_idx):
        images, masks = batch
        loss = self.loss(self(images), masks)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, masks = batch
        logits = self(images)
        self.iou(logits, masks)
        self.log("val_iou", self.iou, on_epoch=True)
        self.log("val_loss", self.loss(logits, masks))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=18, power=0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def scenes():
    return DataLoader(Scenes(0, ROWS), BATCH, shuffle=True), DataLoader(Scenes(ROWS, ROWS + 32), BATCH)


PROGRAMS = {
    "template classifier": Program(
        template_classifier, groups=lambda batch: batch[1] % 2, plugins={"LIMES": Works("label_smoothing")}
    ),
    "segmentation": Program(
        Segmentation,
        scenes,
        groups=lambda batch: batch[0].flatten(1).sum(1) > 20,
        plugins={
            "AOL": Refused("concatenates branches", "move that part into a submodule"),
            "LIMES": Refused("label 255", "mask such rows with a negative label"),
            "BiasAudit": Refused("one score vector and one label a row", "(32, 8, 8)"),
            "FLEA": Refused("label has 64 values a row, not one"),
        },
    ),
}
