"""Checks of what training makes of the weights."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import lightning.pytorch
import torch

from groundwire.plugin import Plugins
from groundwire.testing.fitting import Fit, differences, make_trainer, train
from groundwire.testing.modules import of_package
from groundwire.testing.subject import NotApplicableError, Subject, refuse


def alone_equals_bundled(subject: Subject) -> None:
    """``[plugin]`` and ``[Plugins([plugin])]`` train alike, save under the same keys, and leave the user's list."""
    alone, bundled = _seated(subject, subject.factory()), _seated(subject, Plugins([subject.factory()]))
    refuse(differences(alone.tensors, bundled.tensors), "alone against inside Plugins")
    keys = [sorted(_saved_state(f)) for f in (alone, bundled)]
    if keys[0] != keys[1]:
        refuse([f"callback state is saved under {keys[0]} alone and under {keys[1]} inside Plugins"])


def _seated(subject: Subject, callback: Any) -> Fit:
    module = subject.module()
    trainer = make_trainer(module, callback, subject.directory)
    before = list(trainer.callbacks)
    train(trainer, module)
    refuse(_moved(before, trainer))
    return Fit(trainer, module, subject.directory)


def _moved(before: list[Any], trainer: Any) -> list[str]:
    if [id(c) for c in before] == [id(c) for c in trainer.callbacks]:
        return []
    lists = [", ".join(type(c).__name__ for c in callbacks) for callbacks in (before, trainer.callbacks)]
    return [f"trainer.callbacks was ({lists[0]}) and is ({lists[1]}) afterwards"]


def _saved_state(done: Fit) -> dict[str, Any]:
    path = done.directory / "state.ckpt"
    done.trainer.save_checkpoint(path)
    state: dict[str, Any] = torch.load(path, weights_only=True).get("callbacks", {})
    return state


def neutral_changes_nothing(subject: Subject) -> None:
    """With the neutral arguments, weights and optimizer end bit for bit where they end without any plugin."""
    if subject.neutral is None:
        raise NotApplicableError("no neutral= was given: a factory with arguments that ask for ordinary training")
    refuse(differences(subject.fit(subject.neutral()).tensors, subject.fit([]).tensors), "neutral against no plugin")


def late_built_model(subject: Subject) -> None:
    """A model built in ``LightningModule.setup`` or ``configure_model`` trains as one that was there before."""
    subject.kit_only("where it builds its model is its own affair")
    eager = subject.fit(subject.factory()).tensors
    for place in ("LightningModule.setup", "configure_model"):
        late = subject.fit(subject.factory(), of_package(lightning.pytorch, place)())
        refuse(differences(late.tensors, eager), f"model built in {place} against one built before the run")


def second_fit(subject: Subject) -> None:
    """The same Trainer and plugin fit the same module twice."""
    module = subject.module()
    trainer = make_trainer(module, subject.factory(), subject.directory, max_epochs=1)
    before = list(trainer.callbacks)
    train(trainer, module)
    steps, trainer.fit_loop.max_epochs = trainer.global_step, 2
    train(trainer, module)
    refuse(_moved(before, trainer))
    if trainer.global_step <= steps:
        refuse([f"the second fit made no step (global_step stayed {steps})"])
    refuse(_not_finite(Fit(trainer, module, subject.directory)), "after the second fit")


def one_object_in_two_trainers(subject: Subject) -> None:
    """One plugin object serves a second Trainer with another module, and the first module stays as it is."""
    plugin = subject.factory()
    first = subject.fit(plugin)
    before = {key: value.clone() for key, value in first.tensors.items()}
    second = subject.fit(plugin)
    refuse(_not_finite(second), "in the second Trainer")
    refuse(differences(before, first.tensors), "first module before and after the second Trainer's fit")


def _not_finite(done: Fit) -> list[str]:
    return [f"{key} is not finite" for key, value in done.tensors.items() if not bool(torch.isfinite(value).all())]


def both_lightning_packages(subject: Subject) -> None:
    """``lightning.pytorch`` and the standalone ``pytorch_lightning`` train alike."""
    if importlib.util.find_spec("pytorch_lightning") is None:
        raise NotApplicableError("the package pytorch_lightning is not installed")
    subject.kit_only("belongs to one of the two packages")
    standalone = of_package(importlib.import_module("pytorch_lightning"))
    one, other = subject.fit(subject.factory()), subject.fit(subject.factory(), standalone())
    refuse(differences(one.tensors, other.tensors), "lightning.pytorch against pytorch_lightning")
