"""Digits with a planted bias: a mark in one corner gives the label away in training, and means nothing in the test."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from measure import Row
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from groundwire import Plugins, Variant
from groundwire_bias_audit import BiasAudit, Gate, Verdict, audit, evaluate_susceptibility
from groundwire_bias_audit.audit.gate import describe
from groundwire_bias_audit.audit.rates import confusion_counts, disaggregate
from groundwire_bias_audit.stream.variants import pruned

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
CORNER = (slice(0, 2), slice(6, 8))


def mark(images: torch.Tensor) -> torch.Tensor:
    """All ``images`` with the mark."""
    marked = images.clone()
    marked[:, 0, CORNER[0], CORNER[1]] = 1.0
    return marked


def without_meaning(rows: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Scanner and page of each row."""
    return np.array(["a", "b", "c"])[rng.integers(0, 3, rows)], rng.integers(1, 5, rows)


class Marked(Dataset[Any]):
    """Digits, label 1 for those of at least 5; a third of the images has a mark in a corner.

    In training 95 % of the marked images have label 1; in the test the mark is independent of the label. The names of
    scanner and page are independent of everything: nothing may be found there.
    """

    def __init__(self, train: bool, seed: int) -> None:
        images, digits = load_digits(return_X_y=True)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(digits))
        rows = order[: len(order) // 2] if train else order[len(order) // 2 :]
        y = (digits[rows] >= 5).astype(int)
        chance = np.where(y == 1, 0.57, 0.03) if train else np.full(len(rows), 0.5)
        marked = rng.random(len(rows)) < chance
        self.plain = torch.tensor(images[rows].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
        self.x = torch.where(torch.tensor(marked)[:, None, None, None], mark(self.plain), self.plain)
        self.y = torch.tensor(y)
        self.mark = np.where(marked, "marked", "plain")
        self.scanner, self.page = without_meaning(len(rows), rng)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


class Classifier(pl.LightningModule):
    """A small CNN with one score."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


@dataclass(frozen=True)
class Outcome:
    """One version of one model.

    ``accusations`` are those of scanner and page. ``effect`` is the truth about the mark: the largest change of
    accuracy, TPR or FPR when every test image gets it. ``redrawn`` tells of new draws of scanner and page, the same for
    all versions of a seed, whether either is accused, which is always false.
    """

    seed: int
    version: str
    accuracy: float
    verdict: Verdict
    found: bool
    accusations: tuple[str, ...]
    gap: float
    effect: float
    redrawn: Any
    flip_rate: float
    auroc: dict[str, float]


def train(seed: int, epochs: int, folder: str) -> tuple[Classifier, BiasAudit, Marked, dict[str, Any]]:
    """A dense model, audited on the test images with its pruned and fine-tuned versions; their weights by name."""
    torch.manual_seed(seed)
    data, model = Marked(True, seed), Classifier()
    loader = DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    options = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    pl.Trainer(max_epochs=epochs, **options).fit(model, loader)
    versions = {f"{s:g}": fine_tuned(model, s, loader, max(1, epochs // 2)) for s in SPARSITIES}
    variants = [Variant(name, partial(swapped, model, weights)) for name, weights in versions.items()]
    plugin = BiasAudit(["mark", "scanner", "page"], variants=variants, gate=Gate())
    test = Marked(False, seed)
    pl.Trainer(callbacks=[Plugins([plugin], report=False)], **options).test(model, DataLoader(test, 256), verbose=False)
    return model, plugin, test, versions


def fine_tuned(model: Classifier, sparsity: float, loader: Any, epochs: int) -> dict[str, torch.Tensor]:
    """Weights of ``model`` after magnitude pruning and some more training of what is left."""
    small = copy.deepcopy(model)
    with pruned(small, sparsity):
        masks = {name: p != 0 for name, p in small.named_parameters()}
        optimizer = torch.optim.Adam(small.parameters(), 1e-3)
        for _ in range(epochs):
            for batch in loader:
                optimizer.zero_grad()
                small.training_step(batch, 0).backward()
                optimizer.step()
                with torch.no_grad():
                    for name, p in small.named_parameters():
                        p.mul_(masks[name])
        return {name: p.detach().clone() for name, p in small.named_parameters()}


@contextmanager
def swapped(model: Classifier, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """``model`` with other weights while open."""
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        _write(model, weights)
        yield
    finally:
        _write(model, own)


def _write(model: Classifier, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def outcomes(seed: int, epochs: int, folder: str, draws: int) -> Iterator[Outcome]:
    """What the audit says about each version, and how well the dense model alone foretold its flips."""
    model, audited, test, versions = train(seed, epochs, folder)
    dense = scores(model, test.x)
    for name, result in audited.results["test"].items():
        found = any(t.attribute == "mark" and "marked" in t.outliers for t in result.disparities)
        accusations = tuple(describe(t) for t in result.disparities if t.attribute != "mark")
        gap = max(t.gap for t in result.tests if t.attribute == "mark")
        with nullcontext() if name == "dense" else swapped(model, versions[name]):
            own, changed = scores(model, test.x), effect(model, test)
        flipped = (own >= 0.5) != (dense >= 0.5)
        auroc = {} if name == "dense" else evaluate_susceptibility(flipped, dense, test.mark, random_state=seed)
        accuracy = float(result.to_frame([])["accuracy"].iloc[0])
        again, flips = accused(test, own, draws), float(flipped.mean())
        yield Outcome(seed, name, accuracy, result.verdict, found, accusations, gap, changed, again, flips, auroc)


def scores(model: Classifier, images: torch.Tensor) -> Any:
    """P(y=1) of every image."""
    with torch.no_grad():
        return model.eval()(images)[:, 0].sigmoid().numpy()


def effect(model: Classifier, test: Marked) -> float:
    """The largest change of a rate from all test images without the mark to all of them with it."""
    predicted = [scores(model, images) >= 0.5 for images in (test.plain, mark(test.plain))]
    y = test.y.numpy()
    counts = confusion_counts(np.repeat([0, 1], len(y)), np.tile(y, 2), np.concatenate(predicted), 2)
    gated = ("accuracy", "true_positive_rate", "false_positive_rate")
    return max(float(found["difference"]) for found in disaggregate(counts, gated).values())


def accused(test: Marked, own: Any, draws: int) -> Any:
    """Whether an audit accuses scanner or page, for each of some new draws of them."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        scanner, page = without_meaning(len(test), rng)
        features = {"mark": test.mark, "scanner": scanner, "page": page}
        tests = audit(test.y, own, sensitive_features=features).tests
        found.append(any(t.disparity and t.attribute != "mark" for t in tests))
    return np.array(found)


def planted(seeds: int, epochs: int, draws: int) -> list[Row]:
    """Digits with a planted mark: is it found, is anything else accused, and who foretold the flips?"""
    found = []
    for seed in track(range(seeds), "planted bias", transient=True):
        with tempfile.TemporaryDirectory() as folder:
            found += outcomes(seed, epochs, folder, draws)
    tolerance = Gate().tolerance
    accusing = [bool(o.accusations) for o in found]
    there = [o.found for o in found if o.effect > tolerance]
    rows = [
        Row("planted group missed, of all versions", "%", [100 * (1 - np.mean([o.found for o in found]))], 0.0),
        Row("planted group missed where its effect exceeds the tolerance", "%", [100 * (1 - np.mean(there or [1]))]),
        Row("versions in which another attribute is accused", "%", [100 * np.mean(accusing)], 0.0),
        Row("the same, its values drawn again", "%", [100 * float(np.mean([o.redrawn for o in found]))]),
        Row("chance that no version accuses another attribute", "%", [100 * silence(found)]),
    ]
    for o in found:
        for text in o.accusations:
            print(f"seed {o.seed}, {o.version}: {text}")
    for version in dict.fromkeys(o.version for o in found):
        own = [o for o in found if o.version == version]
        rows.append(Row(f"accuracy, {version}", "", [o.accuracy for o in own]))
        rows.append(Row(f"largest gap of the mark, {version}", "", [o.gap for o in own]))
        rows.append(Row(f"effect of the mark on all test images, {version}", "", [o.effect for o in own]))
        if version != "dense":
            rows.append(Row(f"flip rate, {version}", "", [o.flip_rate for o in own]))
            for method in own[0].auroc:
                rows.append(Row(f"AUROC of flips, {method}, {version}", "", [o.auroc[method] for o in own]))
    return rows


def silence(found: Sequence[Outcome]) -> float:
    """Share of draws in which all versions of a seed accuse nobody, multiplied over seeds."""
    seeds = {o.seed for o in found}
    return float(np.prod([1 - np.any([o.redrawn for o in found if o.seed == s], axis=0).mean() for s in seeds]))
