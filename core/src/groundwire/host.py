"""The callback that carries a run: first in the Trainer's list while the run is open, gone afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback

from groundwire import checkpoint, transform
from groundwire._lightning import (
    before_training_step,
    is_averaging,
    is_misconfiguration,
    rest,
    resting,
    takes_dataloader_iter,
)
from groundwire.errors import PluginError, problems_error
from groundwire.evaluation import evaluate
from groundwire.fields import DefaultFields, GivenFields, unknown_batch
from groundwire.gradient import GradientService
from groundwire.guard import unseen
from groundwire.hooks import Hooks, implementations, mistakes
from groundwire.ids import IdsService
from groundwire.keeping import FindingsService
from groundwire.modules import evaluating
from groundwire.optimizers import in_a_run
from groundwire.order import name_of
from groundwire.run import RunContext
from groundwire.scores import ScoreService
from groundwire.seating import Seating
from groundwire.train_data import TrainDataService
from groundwire.types import BatchStage, Evaluation, Fields, Problem, Variant


def host_of(trainer: Any) -> Host | None:
    """The open run's host in ``trainer``, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Host)), None)


def open_run(trainer: Any, module: Any, stage: str) -> Host:
    """The run of ``trainer``, opened if it is not open yet.

    Raises:
        PluginError: With all problems of all plugins; everything is as before then.
    """
    host = host_of(trainer)
    if host is None:
        host = Host(trainer, module, stage)
        try:
            host.open()
        except BaseException:
            host.close()
            raise
    return host


class Host(Callback):
    """One run. Services do the work; this class says when."""

    def __init__(self, trainer: Any, module: Any, stage: str) -> None:
        self.trainer, self.module, self.fn = trainer, module, str(getattr(stage, "value", stage))
        self.stack = ExitStack()
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.ready = False
        self.seating = Seating(trainer)
        self.settings = self.seating.settings
        self.plugins: list[Any] = []
        self.by_name: dict[str, Any] = {}
        self.hooks = Hooks(lambda name: RunContext(self, name))
        self.gradient = GradientService(self)
        self.scores = ScoreService(self)
        self.findings = FindingsService(self)
        self.ids = IdsService(self)
        self.train_data = TrainDataService(self)
        self._late_build = ExitStack()
        self._starters: list[str] = []
        self._takes_iterator = False

    # Opening and closing

    def open(self) -> None:
        """Take the seats, check, and transform the model."""
        self.plugins, problems = self.seating.resolve()
        members = [self.module, *([self.trainer.datamodule] if self.trainer.datamodule is not None else [])]
        for plugin in self.plugins:
            problems += mistakes(plugin, is_plugin=True)
        for member in members:
            problems += mistakes(member, is_plugin=False)
        if problems:
            raise problems_error(problems)
        self.stack.enter_context(self.seating.taken(self))
        self._register(members)
        self._check(self.gradient.refresh() + self.scores.problems() + self._averaging_problems())
        checkpoint.wrap_io(self)
        self.stack.enter_context(self._late_build)
        transform.apply(self, self._late_build)
        self.scores.open()
        self.ids.open()
        if self.fn == "fit":
            self.train_data.open()

    def close(self) -> None:
        """Take everything away that belongs to the run."""
        with self.stack:
            checkpoint.freeze_provenance(self.trainer)

    def _register(self, members: Sequence[Any]) -> None:
        """Last registered is called first: core's default fields last of all, the user's own answers first."""
        self.hooks.register(DefaultFields())
        for plugin in reversed(self.plugins):
            self._add(plugin, name_of(plugin))
        for member, name in zip(members, ("lightning_module", "datamodule"), strict=False):
            self._add(member, name)
        if self.settings.fields is not None:
            self.hooks.register(GivenFields(self.settings.fields))

    def _add(self, obj: Any, name: str) -> None:
        self.hooks.register(obj, name)
        self.by_name[name] = obj

    def _check(self, problems: list[Problem]) -> None:
        problems = problems + self.hooks.collect("gw_check", Problem)
        if problems:
            raise problems_error(problems)

    def _get_ready(self) -> None:
        """Model and optimizers exist now, whichever stage comes first."""
        if self.ready:
            return
        self._late_build.close()
        self.ready = True
        self._takes_iterator = self.fn == "fit" and takes_dataloader_iter(self.module)
        problems = [p for optimizer in self.trainer.optimizers for p in mistakes(optimizer, is_plugin=False)]
        if not problems:
            self._register_optimizers()
        self._check(problems + self.gradient.refresh() + self.scores.ready() + self._unreadable())
        self.gradient.attach()
        self._starters = self.hooks.owners("gw_batch_start")
        if self.fn == "fit" and (self._starters or self.gradient.recording or self.scores.wanted("train")):
            self.stack.enter_context(before_training_step(self.trainer, self._before_training_step))
        self.findings.ready()
        self._rest()

    def _unreadable(self) -> list[Problem]:
        """Batches that are not known before the step takes them."""
        starters = self.hooks.owners("gw_batch_start")
        if not (starters and self._takes_iterator):
            return []
        text = "training_step takes dataloader_iter, so no batch is known before its forward pass"
        return [Problem(name, text, "take batch") for name in starters]

    def _register_optimizers(self) -> None:
        for optimizer in self.trainer.optimizers:
            if implementations(optimizer):
                self._add(optimizer, name_of(optimizer))
                in_a_run.add(optimizer)
                self.stack.callback(in_a_run.discard, optimizer)

    def _rest(self) -> None:
        """Be passed by where this run has nothing to do, so that an idle plugin costs little."""
        rest(self, "on_after_backward")
        if self.gradient.idle:
            rest(self, "on_before_zero_grad", "on_before_backward", "on_before_optimizer_step")
        if not (self.ids.wanted or (self._takes_iterator and self.scores.wanted("train"))):
            rest(self, "on_train_batch_start")
        if not self.scores.wanted("train"):
            rest(self, "on_train_batch_end")
        for callback in [*self.plugins, *self.seating.bundles]:
            self.stack.enter_context(resting(callback))

    def _averaging_problems(self) -> list[Problem]:
        if self.fn != "fit" or not self.hooks.owners("gw_transform_model"):
            return []
        return [
            Problem(
                "groundwire",
                f"{type(callback).__qualname__} is listed before the plugins, so it copied the model before "
                f"{', '.join(self.hooks.owners('gw_transform_model'))} changed it",
                "list it after them",
            )
            for callback in self.seating.before_plugins()
            if is_averaging(callback)
        ]

    # What plugins ask for

    @property
    def stage(self) -> str:
        """See :attr:`RunContext.stage`."""
        stage = str(self.trainer.state.stage.value) if self.trainer.state.stage is not None else self.fn
        return {"sanity_check": "validate", "fit": "train"}.get(stage, stage)

    def fields(self, batch: Any) -> Fields:
        """See :meth:`RunContext.fields`."""
        found = self.hooks.call("gw_fields", batch=batch)
        if found is None:
            raise unknown_batch(batch)
        if not isinstance(found, Fields):
            raise PluginError(f"gw_fields must return Fields or None, got {type(found).__name__}")
        return found

    def variants(self) -> list[Variant]:
        """See :meth:`RunContext.variants`."""
        return list(self.hooks.collect("gw_variants", Variant, module=self.module))

    def evaluate(self, variant: Variant | None, stage: str) -> Evaluation:
        """See :meth:`RunContext.evaluate`."""
        return evaluate(self, variant, stage)

    def forward(self, batch: Any) -> Any:
        """See :meth:`RunContext.forward`."""
        inputs, module = self.fields(batch).inputs, self.module
        without_trace = unseen(module, self.trainer)
        precision = self.trainer.precision_plugin.forward_context()
        with self.scores.aside(), without_trace, evaluating(module), torch.no_grad(), precision:
            return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)

    def batch_start(
        self, batch: Any, stage: BatchStage, variant: str | None = None, first: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Call ``gw_batch_start``; ``first`` is what it returned when a replayed batch came first.

        Returns:
            What each implementation returned, by its name.
        """
        found = {}
        for name in self._starters:
            result = None if first is None else first.get(name)
            arguments = {"batch": batch, "stage": stage, "variant": variant, "first_result": result}
            found[name] = next(iter(self.hooks.call("gw_batch_start", only=(name,), **arguments)), None)
        return found

    def log(self, key: str, value: Any, **kwargs: Any) -> None:
        """See :meth:`RunContext.log`. The class's own ``log``: an instance may be muted at the moment."""
        try:
            type(self.module).log(self.module, key, value, **kwargs)
        except Exception as error:
            if not is_misconfiguration(error):
                raise
            self.findings.send({key: float(value)})

    # Lightning's hooks

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Second check, and the services that need optimizers."""
        self._get_ready()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """A new accumulation window."""
        self.gradient.before_zero_grad(optimizer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """One more micro-batch of the window."""
        self.gradient.before_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradient is complete and unclipped."""
        self.gradient.before_optimizer_step(optimizer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Ids; and capturing, where the step takes its batches by itself."""
        self.ids.before_batch("train", 0)
        if self._takes_iterator:
            self.scores.before_batch("train")

    def _before_training_step(self, batch: Any, batch_idx: int) -> None:
        """The batch as the step gets it. Tuners take all callbacks out of the Trainer while they try steps."""
        if self not in self.trainer.callbacks:
            return
        self.gradient.before_step(batch, batch_idx)
        self.scores.find(batch, "train")
        self.gradient.started(self.batch_start(batch, "train"))
        self.scores.before_batch("train")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Training scores."""
        self.scores.after_batch(batch, "train")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ids and capturing."""
        self.before_batch(batch, "sanity" if trainer.sanity_checking else self.stage, dataloader_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores, except in the sanity check."""
        if not trainer.sanity_checking:
            self.scores.after_batch(batch, self.stage)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def before_batch(self, batch: Any, stage: Any, dataloader_idx: int, variant: str | None = None) -> None:
        """What every stage but training does before a batch."""
        self.ids.before_batch(self.stage, dataloader_idx)
        self.scores.find(batch, self.stage)
        self.batch_start(batch, stage, variant)
        self.scores.before_batch(stage)  # nobody gets scores of the sanity check

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Findings of the validation; variants are evaluated here."""
        if not trainer.sanity_checking:
            self.findings.collect()

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Findings of the test."""
        self.findings.collect()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The report of ``trainer.validate``."""
        if self.fn == "validate":
            self.findings.write()

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """The report of ``trainer.test``."""
        self.findings.write()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Findings and report of ``fit``. Later hooks come after the strategy was torn down."""
        self.findings.collect()
        self.findings.write()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The run is over."""
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning does not call ``teardown`` when a step raises."""
        self.close()
