"""What a program is, and how one is run: bare, with plugins that do nothing, and with those that do something."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from groundwire import Plugin, Plugins, hookimpl

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

ROWS, BATCH = 96, 16

_pixels, _labels = load_digits(n_class=4, return_X_y=True)
IMAGES = torch.tensor(_pixels[: 2 * ROWS] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
DIGITS = torch.tensor(_labels[: 2 * ROWS])


def digits(rows: slice = slice(ROWS)) -> TensorDataset:
    """Images of shape (1, 8, 8) in [0, 1] and their digits."""
    return TensorDataset(IMAGES[rows], DIGITS[rows])


def digit_loaders() -> tuple[DataLoader, DataLoader]:
    """Training and validation data."""
    return DataLoader(digits(), BATCH, shuffle=True), DataLoader(digits(slice(ROWS, ROWS + 32)), BATCH)


@dataclass(frozen=True)
class Works:
    """A plugin does its work in a program. Each of ``warns`` is in a warning, and each warning holds one of them."""

    warns: tuple[str, ...]

    def __init__(self, *warns: str) -> None:
        object.__setattr__(self, "warns", warns)


@dataclass(frozen=True)
class Refused:
    """A plugin refuses a program with an error in which all these words appear."""

    words: tuple[str, ...]

    def __init__(self, *words: str) -> None:
        object.__setattr__(self, "words", words)


@dataclass(frozen=True)
class Program:
    """A Lightning program as a user has it.

    Attributes:
        module: Makes the LightningModule.
        data: Makes the training and validation loaders.
        options: What the Trainer gets beside the callbacks.
        callbacks: Makes the user's own callbacks.
        fields: What a user has to tell of batches of a class of their own, for ``Plugins(fields=...)``.
        groups: Groups of the rows of a batch.
        loss_fn: The loss for replays under manual optimization.
        draws: Whether the validation step draws random numbers, so that no two passes are equal.
        plugins: What is expected of each plugin other than that it works; None where it has nothing to do.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], tuple[Any, Any]] = digit_loaders
    options: Callable[[], Mapping[str, Any]] = dict
    callbacks: Callable[[], Sequence[pl.Callback]] = list
    fields: Callable[[Any], Any] | None = None
    groups: Callable[[Any], Any] | None = None
    loss_fn: Callable[..., torch.Tensor] | None = None
    draws: bool = False
    plugins: Mapping[str, Works | Refused | None] = field(default_factory=dict)


class Rows(Logger):
    """A logger that keeps every row that it is given."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.rows.append((step, {key: float(value) for key, value in metrics.items()}))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are not compared."""


class Idle(Plugin):
    """Takes part in a run and does nothing."""

    name = "idle"


class Replay(Plugin):
    """Pays for a second pass at unchanged weights and hands its gradient to the optimizer: the same one again."""

    name = "replay"

    def __init__(self, loss_fn: Callable[..., Any] | None = None) -> None:
        self.loss_fn, self.replays = loss_fn, 0

    @hookimpl
    def gw_gradient(self, step: Any) -> Any:
        self.replays += 1
        return step.replay(same_rng=True)


class Evaluates(Plugin):
    """Makes one more validation pass of the model as it is, and keeps what it gave."""

    name = "evaluates"

    def __init__(self) -> None:
        self.found: list[Any] = []

    @hookimpl
    def gw_findings(self, run: Any) -> Any:
        if run.stage == "validate":
            self.found.append(run.evaluate())
        return []


@dataclass(frozen=True)
class Run:
    """What a user can see of one training."""

    module: pl.LightningModule
    trainer: pl.Trainer
    state: Mapping[str, torch.Tensor]
    metrics: Mapping[str, float]
    rows: Sequence[tuple[int | None, Mapping[str, float]]]
    warned: Sequence[str]


def run(program: Program, *plugins: Any) -> Run:
    """Train ``program`` with ``plugins`` beside the user's own callbacks, from the same random state each time."""
    pl.seed_everything(3, verbose=False)
    module, logger = program.module(), Rows()
    train, validation = program.data()
    options = {
        "max_epochs": 3, "accelerator": "cpu", "logger": logger, "log_every_n_steps": 1,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        **program.options(),
    }  # fmt: skip
    bundle = [Plugins(list(plugins), fields=program.fields, report=False)] if plugins else []
    trainer = pl.Trainer(callbacks=[*bundle, *program.callbacks()], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train, validation)
    state = copy.deepcopy(module.state_dict())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Run(module, trainer, state, metrics, logger.rows, [str(w.message) for w in caught if not _advice(w)])


def zeros(module: torch.nn.Module) -> float:
    """Share of zeros in the weights that have more than one dimension."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def _advice(warning: Any) -> bool:
    """Lightning's advice on loader workers, about speed, and torch's own deprecations inside Lightning."""
    text = str(warning.message)
    return "does not have many workers" in text or "isinstance(treespec, LeafSpec)" in text


def difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of two state dicts of the same names."""
    assert list(left) == list(right)
    pairs = [(left[name].double(), right[name].double()) for name in left if left[name].numel()]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def assert_same(bare: Run, other: Run) -> None:
    """Nothing that a user can see differs."""
    assert difference(bare.state, other.state) == 0.0
    assert bare.metrics == other.metrics
    assert bare.rows == other.rows
    assert bare.warned == other.warned
