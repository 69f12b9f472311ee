"""A program with a model of transformers: dict batches, keyword arguments, an output object."""

from __future__ import annotations

from collections import UserDict

import lightning.pytorch as pl
import torch
from programs_harness import BATCH, ROWS, Program, Refused
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


class Encoding(UserDict):
    """What a tokenizer gives: a mapping of its own class that goes to a device as a whole."""

    def to(self, device, non_blocking=False):
        self.data = {key: value.to(device, non_blocking=non_blocking) for key, value in self.data.items()}
        return self


class Sentences(Dataset):
    """Random tokens; the label is whether a token of the upper half comes first."""

    def __init__(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, 40, (rows, 10), generator=generator)
        self.lengths = torch.randint(4, 11, (rows,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return self.ids[i, : self.lengths[i]], int(self.ids[i, 0] > 22)


def collate(rows):
    """Pad to the longest sentence of the batch."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, (row, _) in enumerate(rows):
        ids[place, : len(row)] = row
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([label for _, label in rows])}


def encode(rows):
    return Encoding(collate(rows))


def bert():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=2, attn_implementation="eager", **shape)
    return BertForSequenceClassification(config)


class TextClassifier(pl.LightningModule):
    """Bias and LayerNorm without weight decay, a linear schedule with warm-up, gradients clipped."""

    def __init__(self):
        super().__init__()
        self.model = bert()
        self.accuracy = MulticlassAccuracy(2)

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.log("train_loss", loss, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        outputs = self(**batch)
        self.accuracy(outputs.logits.argmax(dim=1), batch["labels"])
        self.log("val_acc", self.accuracy, batch_size=len(batch["labels"]))
        self.log("val_loss", outputs.loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self):
        plain = ("bias", "LayerNorm.weight")
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if not n.endswith(plain)], "weight_decay": 0.01},
            {"params": [p for n, p in named if n.endswith(plain)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=5e-3)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class PopsLabels(TextClassifier):
    """Takes the labels out of the batch, so that the loss is its own."""

    def _loss(self, batch):
        labels = batch.pop("labels")
        logits = self(**batch).logits
        return torch.nn.functional.cross_entropy(logits, labels), logits, labels

    def training_step(self, batch, batch_idx):
        loss, _, labels = self._loss(batch)
        self.log("train_loss", loss, batch_size=len(labels))
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss, logits, labels = self._loss(batch)
        self.accuracy(logits.argmax(dim=1), labels)
        self.log("val_acc", self.accuracy, batch_size=len(labels))
        self.log("val_loss", loss, batch_size=len(labels))


def sentences(collate_fn):
    def loaders():
        train = DataLoader(Sentences(ROWS, 1), BATCH, shuffle=True, collate_fn=collate_fn)
        return train, DataLoader(Sentences(32, 2), BATCH, collate_fn=collate_fn)

    return loaders


def first_token(batch):
    return batch["input_ids"][:, 1] > 22


OPTIONS = {
    "options": lambda: {"gradient_clip_val": 0.5},
    "groups": first_token,
    "plugins": {"AOL": Refused("cannot be traced", "part")},
}
PROGRAMS = {
    "transformers classifier": Program(TextClassifier, sentences(collate), **OPTIONS),
    "batches of a mapping class": Program(PopsLabels, sentences(encode), **OPTIONS),
}
