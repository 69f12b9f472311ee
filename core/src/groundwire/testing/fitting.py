"""One small quiet fit, and comparing two of them bit by bit."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from groundwire.testing.isolation import quiet, seeded
from groundwire.testing.loaders import evaluation_loader, train_loader

_OPTIONS = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Fit:
    """A finished fit.

    Attributes:
        trainer: Its Trainer.
        module: The trained module.
        directory: Where the Trainer writes.
    """

    trainer: Any
    module: Any
    directory: Path

    @property
    def logged(self) -> dict[str, float]:
        """The last value of everything that was logged."""
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and optimizer state; see :func:`tensors_of`."""
        return tensors_of(self.trainer, self.module)


def package_of(module: Any) -> ModuleType:
    """The Lightning package that ``module`` belongs to: a Trainer of the other one refuses it."""
    roots = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    return importlib.import_module("pytorch_lightning" if "pytorch_lightning" in roots else "lightning.pytorch")


def make_trainer(module: Any, callbacks: Any, directory: Path, **options: Any) -> Any:
    """A quiet Trainer for ``module``; ``callbacks`` is one or several, ``options`` are the Trainer's."""
    with quiet():
        return package_of(module).Trainer(
            callbacks=listed(callbacks), **{**_OPTIONS, "default_root_dir": str(directory), **options}
        )


def listed(callbacks: Any) -> list[Any]:
    """One callback or several, as a new list."""
    return list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]


def train(trainer: Any, module: Any, *, loader: Any = None, ckpt_path: Any = None, seed: int = 0) -> None:
    """Fit ``module`` from the random states of ``seed``, on its own loaders or else on the kit's data.

    A checkpoint is read with ``weights_only=True``, as plugins keep plain state only.
    """
    loaders = (train_loader(module) if loader is None else loader, evaluation_loader(module))
    with quiet(), seeded(seed):
        trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)


def fit(callbacks: Any, module: Any, directory: Path, *, loader: Any = None, seed: int = 0, **options: Any) -> Fit:
    """:func:`make_trainer` and :func:`train` in one."""
    trainer = make_trainer(module, callbacks, directory, **options)
    train(trainer, module, loader=loader, seed=seed)
    return Fit(trainer, module, directory)


def tensors_of(trainer: Any, module: Any) -> dict[str, Tensor]:
    """Everything that training moves, by name: ``"weights.<key>"`` and ``"optimizer0.<parameter>.<key>"``."""
    found = {f"weights.{key}": value for key, value in module.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer{number}.{index}.{k}": torch.as_tensor(v) for k, v in state.items() if v is not None}
    return found


def differences(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Return what is not bit-equal between two mappings of tensors, one line each; empty if nothing.

    Example:
        >>> differences({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 0.5])})
        ['w differs by up to 0.5']
        >>> differences({"w": torch.zeros(2)}, {})
        ['w is on one side only']
    """
    lines = [f"{name} is on one side only" for name in sorted(left.keys() ^ right.keys())]
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(
                f"{name} is {a.dtype} {tuple(a.shape)} on one side and {b.dtype} {tuple(b.shape)} on the other"
            )
        elif not torch.equal(a, b):
            lines.append(f"{name} differs by up to {float((a.double() - b.double()).abs().max()):.3g}")
    return sorted(lines)
