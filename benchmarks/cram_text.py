"""A BERT-shaped classifier of Python's own documentation strings, trained with AdamW without and with CrAM."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import torch
from measure import Row
from rich.progress import track
from torch.utils.data import DataLoader, TensorDataset, random_split
from transformers import BertConfig, BertForSequenceClassification

from groundwire_cram import CrAM, prune

#: Modules of the standard library whose documentation strings are told apart.
MODULES = ("decimal", "argparse", "turtle", "logging", "email", "tkinter", "asyncio", "xml")
LENGTH = 64
LEVELS = (0.5, 0.7, 0.8)


def docstrings(module: str) -> str:
    """All documentation strings of a module or package, read from its source."""
    home = Path(sysconfig.get_paths()["stdlib"])
    names = ["_pydecimal" if module == "decimal" else module]
    found = [home / f"{name}.py" for name in names if (home / f"{name}.py").exists()]
    sources = found or sorted((home / module).rglob("*.py"))
    texts = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return "\n".join(texts)


def windows(limit: int) -> TensorDataset:
    """Pieces of LENGTH characters with the number of their module, at most ``limit`` of each."""
    inputs, labels = [], []
    for label, module in enumerate(MODULES):
        text = docstrings(module).encode("ascii", "ignore")
        pieces = [text[start : start + LENGTH] for start in range(0, len(text) - LENGTH, LENGTH)][:limit]
        inputs += [torch.tensor(list(piece)) for piece in pieces]
        labels += [label] * len(pieces)
    return TensorDataset(torch.stack(inputs), torch.tensor(labels))


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LENGTH,
            num_labels=len(MODULES),
        )
        self.bert = BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        return self.bert(input_ids=tokens, labels=labels).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)


def accuracy(model: Classifier, data) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for tokens, labels in DataLoader(data, batch_size=256):
            right += int((model.bert(input_ids=tokens).logits.argmax(1) == labels).sum())
    return 100 * right / len(data)


def measure(quick: bool, seeds: int | None = None) -> list[Row]:
    """Accuracy in %, dense and pruned in one shot, without and with CrAM."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for seed in track(range(seeds or (1 if quick else 3)), "documentation strings: BERT shape", transient=True):
        data = windows(50 if quick else 600)
        train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(seed))
        for way, callbacks in {"AdamW": [], "CrAM": [CrAM((0.5, 0.7, 0.8), 0.05, skip="*embeddings*")]}.items():
            pl.seed_everything(seed, verbose=False)
            model = Classifier()
            trainer = pl.Trainer(
                max_epochs=1 if quick else 12,
                callbacks=callbacks,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
            found.setdefault(f"BERT shape, {way}, dense", []).append(accuracy(model, test))
            for level in LEVELS:
                pruned = prune(model, level, skip="*embeddings*")
                found.setdefault(f"BERT shape, {way}, {100 * level:g} %", []).append(accuracy(pruned, test))
    return [Row(what, "%", values) for what, values in found.items()]
