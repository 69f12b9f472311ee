"""The callback that carries a run: first in the Trainer's list while the run is open, gone afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback

from groundwire import checkpoint, transform
from groundwire._lightning import is_averaging, is_misconfiguration, rest, resting
from groundwire.errors import PluginError, problems_error
from groundwire.evaluation import evaluate
from groundwire.fields import DefaultFields, GivenFields, unknown_batch
from groundwire.gradient import GradientService
from groundwire.hooks import Hooks, implementations, mistakes
from groundwire.ids import IdsService
from groundwire.keeping import FindingsService
from groundwire.optimizers import in_a_run
from groundwire.order import name_of
from groundwire.run import RunContext
from groundwire.scores import ScoreService
from groundwire.seating import Seating
from groundwire.train_data import TrainDataService
from groundwire.types import Evaluation, Fields, Problem, Variant


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
        problems = [p for optimizer in self.trainer.optimizers for p in mistakes(optimizer, is_plugin=False)]
        if not problems:
            self._register_optimizers()
        self._check(problems + self.gradient.refresh() + self.scores.ready())
        self.gradient.attach()
        self.findings.ready()
        self._rest()

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
        if not self.scores.wanted("train"):
            # Not on_train_batch_start: an offset that comes later is probed there.
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

    def refuse_early_averaging(self, owner: str) -> None:
        """Raise if an averaging callback copied the model before ``owner`` adds a buffer to it.

        The head is known only after every ``setup``, so no order helps.
        """
        early = [type(c).__qualname__ for c in self.trainer.callbacks if is_averaging(c)]
        if early and self.fn == "fit":
            raise PluginError(
                f"{early[0]} copied the model before {owner!r} corrects its head -> train without {early[0]}"
            )

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

    def correct_again(self, hook: str, *arguments: Any) -> None:
        """Call Lightning's ``hook`` of whoever corrects the head: a correction may differ from batch to batch."""
        for plugin in self.plugins:
            if name_of(plugin) == self.scores.offset_owner:
                getattr(plugin, hook)(self.trainer, self.module, *arguments)

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
        """Ids, and capturing where a plugin wants training scores."""
        self.before_batch(batch, "train", 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Training scores."""
        self.scores.after_batch(batch, "train")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ids and capturing."""
        self.before_batch(batch, self.stage, dataloader_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores, except in the sanity check."""
        if not trainer.sanity_checking:
            self.scores.after_batch(batch, self.stage)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def before_batch(self, batch: Any, stage: str, dataloader_idx: int) -> None:
        """What every stage does before a batch."""
        self.ids.before_batch(stage, dataloader_idx)
        self.scores.before_batch(batch, stage)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Findings of the validation; variants are evaluated here."""
        self.scores.after_epoch()
        if not trainer.sanity_checking:
            self.findings.collect()

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Findings of the test."""
        self.scores.after_epoch()
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
