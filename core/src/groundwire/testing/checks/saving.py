"""Checks of what is saved and comes back."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from groundwire.discovery import init_arguments
from groundwire.hooks.ordering import name_of
from groundwire.hooks.registry import implementations
from groundwire.testing.loaders import stateful, unshuffled
from groundwire.testing.modules import without_dropout
from groundwire.testing.resuming import resume
from groundwire.testing.subject import NotApplicableError, Subject, ViolationError, refuse


def resume_equals_uninterrupted(subject: Subject) -> str:
    """Saved on disk in mid-epoch and continued by new objects, training ends bit for bit where it would have.

    Dropout is off: Lightning does not restore the global random state that its masks come from.
    """
    stop_after, loader, note = _place(subject.factory())
    options: dict[str, Any] = {"stop_after": stop_after, "loader": loader}

    def module() -> Any:
        return without_dropout(subject.module())

    problems = resume(subject.factory, module, subject.directory, **options).differences
    if problems and resume(list, module, subject.directory, **options).differences:
        raise NotApplicableError("the module does not resume bit for bit without any plugin either")
    refuse(problems, "resumed against uninterrupted")
    return note


def _place(plugin: Any) -> tuple[int | None, Any, str]:
    """Return the batch to interrupt at, the kind of loader, and both in words.

    A loader that knows its place hides its data set, which some plugins must choose from.
    """
    if "gw_train_data" in implementations(plugin) or getattr(plugin, "needs_ids", False):
        return None, unshuffled, "at the end of an epoch, with a plain DataLoader: the plugin needs its data set"
    return 3, stateful, ""


def arguments_round_trip(subject: Subject) -> str:
    """The plugin survives pickle, or can be made again from the plain arguments that a checkpoint keeps of it.

    A plugin that changes the model's structure must manage the second: ``groundwire.load`` makes it again.
    """
    plugin = subject.factory()
    try:
        twin = pickle.loads(pickle.dumps(plugin))
    except Exception as error:
        _made_again(plugin)
        return f"by its arguments; it does not pickle ({type(error).__name__}: {error})"
    refuse(_unlike(plugin, twin), "after pickle")
    if "gw_transform_model" in implementations(plugin):
        _made_again(plugin)
    return ""


def _made_again(plugin: Any) -> None:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [n for n, p in inspect.signature(type(plugin)).parameters.items() if p.kind not in kinds]
    refuse(f"argument {name!r} is not kept in an attribute of that name" for name in names if not hasattr(plugin, name))
    refuse(_unlike(plugin, type(plugin)(**init_arguments(plugin))), "made again from its arguments")


def _unlike(plugin: Any, twin: Any) -> list[str]:
    before, after = init_arguments(plugin), init_arguments(twin)
    return [
        f"{n} is {after.get(n)!r} instead of {before.get(n)!r}" for n in before | after if before.get(n) != after.get(n)
    ]


class _SaveOnce(Callback):
    """Saves in mid-training, as ModelCheckpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path)


def provenance_loads(subject: Subject) -> None:
    """Every checkpoint names the plugin and loads with ``torch.load(weights_only=True)``."""
    # Only here, so that the other checks work where checkpoints are not installed.
    from groundwire.services.checkpoint.provenance import plugins_in

    plugin, during = subject.factory(), subject.directory / "during.ckpt"
    done = subject.fit([plugin, _SaveOnce(during)])
    paths = {during: "during the run"}
    for weights_only in (False, True):
        path = subject.directory / f"after_{weights_only}.ckpt"
        done.trainer.save_checkpoint(path, weights_only=weights_only)
        paths[path] = f"after the run with weights_only={weights_only}"
    for path, when in paths.items():
        names = [entry["name"] for entry in plugins_in(_read(path, when))]
        if name_of(plugin) not in names:
            refuse([f"a checkpoint saved {when} names {names or 'no plugin'}, not {name_of(plugin)!r}"])


def _read(path: Path, when: str) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        cause = re.search(r"GLOBAL (\S+)", str(error))
        what = cause[1] if cause else str(error)
        raise ViolationError(f"a checkpoint saved {when} holds objects other than plain ones: {what}") from error
    return checkpoint
