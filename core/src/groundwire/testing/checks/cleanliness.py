"""Checks of what is left on the user's objects."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from lightning.pytorch import Callback

from groundwire._lightning import instance_attribute
from groundwire.context import RunContext
from groundwire.host import Host
from groundwire.modules import overrides
from groundwire.run import Run
from groundwire.testing.fitting import Fit, differences, make_trainer, train
from groundwire.testing.isolation import seeded
from groundwire.testing.loaders import evaluation_loader
from groundwire.testing.subject import Subject, ViolationError, refuse, transformed
from groundwire.testing.traces import holds, left_behind, traces


def clean_after_fit(subject: Subject) -> None:
    """No attribute, hook, buffer or callback is left; what ``gw_transform_model`` gives the model may stay."""
    expected = _traces(subject.fit([], transformed(subject.module(), subject.factory())))
    refuse(left_behind(_traces(subject.fit(subject.factory())), expected), "after fit")


def _traces(done: Fit) -> Counter[str]:
    return traces(done.module, done.trainer)


class PlannedError(RuntimeError):
    """The error that ``training_step`` raises here."""


def clean_after_exception(subject: Subject) -> None:
    """As after a fit, when ``training_step`` raises, also in a replay; the weights did not move; a later fit works."""
    for call in (2, 3):
        plugin, where = subject.factory(), f"after an exception in call {call} of training_step"
        plain = _failed(subject, [], transformed(subject.module(), subject.factory()), call)
        expected = _traces(plain), _traces(subject.fit([], plain.module))
        weights = _Weights()
        done = _failed(subject, [plugin, weights], subject.module(), call)
        refuse(left_behind(_traces(done), expected[0]) + _host_left(done) + weights.moved(done.module), where)
        refuse(left_behind(_traces(subject.fit(plugin, done.module)), expected[1]), f"after the fit that came {where}")


class _Weights(Callback):
    """Knows the weights with which the last training batch began."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def moved(self, module: Any) -> list[str]:
        return differences({name: p.detach() for name, p in module.named_parameters()}, self.before)


def _failed(subject: Subject, callbacks: Any, module: Any, call: int) -> Fit:
    trainer = make_trainer(module, callbacks, subject.directory)
    with _failing(module, call):
        try:
            train(trainer, module)
        except PlannedError:
            return Fit(trainer, module, subject.directory)
    raise ViolationError("an exception of training_step did not reach the caller of fit")


@contextmanager
def _failing(module: Any, call: int) -> Iterator[None]:
    original, calls = module.training_step, count(1)

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise PlannedError
        return original(*args, **kwargs)

    with instance_attribute(module, "training_step", training_step):
        yield


def _host_left(done: Fit) -> list[str]:
    left = any(isinstance(callback, Host) for callback in done.trainer.callbacks)
    return ["groundwire's host was left in trainer.callbacks"] if left else []


def evaluation_changes_nothing(subject: Subject) -> str:
    """``validate``, ``test`` and ``predict`` without a fit leave weights and module as they were."""
    reference = transformed(subject.module(), subject.factory())
    before = {key: value.clone() for key, value in reference.state_dict().items()}
    stages = [s for s in ("validate", "test", "predict") if overrides(reference, _step_of(s))]
    for stage in stages:
        expected = _traces(_evaluated(subject, [], reference, stage))
        done = _evaluated(subject, subject.factory(), subject.module(), stage)
        refuse(differences(done.module.state_dict(), before), f"weights before and after {stage}")
        refuse(left_behind(_traces(done), expected), f"after {stage}")
    return "" if len(stages) == 3 else f"for {', '.join(stages) or 'no stage'}: the module has no other step"


def _step_of(stage: str) -> str:
    return "validation_step" if stage == "validate" else f"{stage}_step"


def _evaluated(subject: Subject, callbacks: Any, module: Any, stage: str) -> Fit:
    trainer = make_trainer(module, callbacks, subject.directory)
    options = {} if stage == "predict" else {"verbose": False}
    loader = evaluation_loader(module, "val" if stage == "validate" else stage)
    with seeded():
        getattr(trainer, stage)(module, loader, **options)
    return Fit(trainer, module, subject.directory)


class _Copier(Callback):
    """Copies the module in the middle of things and looks at what came along."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.kinds = kinds
        self.found: set[str] = set()

    def look(self, module: Any, when: str) -> None:
        try:
            twin = copy.deepcopy(module)
        except Exception as error:
            self.found.add(f"a deep copy made {when} fails ({type(error).__name__}: {error})")
        else:
            self.found |= {f"a deep copy made {when} holds a {name}" for name in holds(twin, self.kinds)}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.look(pl_module, "in training")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look(pl_module, "in validation")


def copies_hold_nothing(subject: Subject) -> None:
    """A deep copy of the module, made during the run or after it, holds neither plugin nor run nor Trainer."""
    plugin = subject.factory()
    copier = _Copier((type(plugin), Host, Run, RunContext))
    done = subject.fit([plugin, copier])
    copier.look(done.module, "after the run")
    refuse(sorted(copier.found))
