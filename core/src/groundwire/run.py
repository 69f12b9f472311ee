"""A run: what is known of it, and what is to be undone when it closes. A record that the services share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from groundwire._lightning import Trainer, flattened_loaders, is_misconfiguration
from groundwire.batch import default_fields, unknown_batch
from groundwire.errors import PluginError
from groundwire.forward import call_forward
from groundwire.hooks.registry import Hooks
from groundwire.modules import evaluating
from groundwire.records import BatchStage, Fields
from groundwire.undo.without_trace import without_trace

_LOADERS = {"train": "train_dataloader", "validate": "val_dataloaders", "test": "test_dataloaders"}


@dataclass(frozen=True)
class Settings:
    """The settings of a run that no single plugin owns; see :class:`groundwire.Plugins`."""

    fields: Callable[[Any], Fields | None] | None = None
    head: str | None = None
    report: bool = True
    report_dir: str | Path | None = None


@dataclass(slots=True)  # made for every batch, and a frozen one costs four times as much
class BatchStart:
    """A batch whose forward passes are about to begin.

    Attributes:
        batch: The batch, on the device.
        stage: What it is for.
        batch_idx: Its index in the epoch.
        dataloader_idx: The loader that it comes from.
        variant: Name of the variant that is being evaluated, None for the model itself.
        observed: Whether its scores are handed out.
    """

    batch: Any
    stage: BatchStage
    batch_idx: int = 0
    dataloader_idx: int = 0
    variant: str | None = None
    observed: bool = True


@dataclass(eq=False)
class Run:
    """One call of ``fit``, ``validate``, ``test`` or ``predict``.

    Attributes:
        trainer: The user's Trainer.
        module: The user's LightningModule.
        function: "fit", "validate", "test" or "predict".
        seed: The global seed, 0 without one.
        settings: Settings of ``Plugins``.
        plugins: The plugins in resolved order.
        listed_before: Callbacks that stand before the first plugin in the user's list.
        implementers: Whoever implements hooks, by name.
        hooks: Their implementations; set by the host before any service is made.
        ready: Whether model and optimizers exist.
        undo: What closing the run undoes, the latest first.
        before_close: Actions at closing, while everything is still there.
        members: Values and methods that services give to the ``run`` of a plugin, by the member's name.
        before_batch: Actions of services at the start of a batch, before ``gw_batch_start``, by stage.
        before_forward: The same, after ``gw_batch_start``.
        after_variant_batch: Actions of services after each batch of a variant: ``action(batch, stage, variant)``.
        extra_passes: Context managers of services that mark forward passes which are not the step's own.
        batch_starters: Names of those that implement ``gw_batch_start``.
        first_results: What each of them returned for the current batch, by name.
    """

    trainer: Trainer
    module: Any
    function: str
    seed: int
    settings: Settings
    plugins: list[Any]
    listed_before: Sequence[Any] = ()
    implementers: dict[str, Any] = field(default_factory=dict)
    hooks: Hooks = field(init=False)
    ready: bool = False
    undo: ExitStack = field(default_factory=ExitStack)
    before_close: list[Callable[[], None]] = field(default_factory=list)
    members: dict[str, Any] = field(default_factory=dict)
    before_batch: dict[str, list[Callable[[BatchStart], None]]] = field(default_factory=lambda: defaultdict(list))
    before_forward: dict[str, list[Callable[[BatchStart], None]]] = field(default_factory=lambda: defaultdict(list))
    after_variant_batch: list[Callable[[Any, str, str], None]] = field(default_factory=list)
    extra_passes: list[Callable[[], AbstractContextManager[None]]] = field(default_factory=list)
    batch_starters: list[str] = field(default_factory=list)
    first_results: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """The running stage: "train", "validate" (also the sanity check), "test" or "predict"."""
        stage = str(self.trainer.state.stage.value) if self.trainer.state.stage is not None else self.function
        return {"sanity_check": "validate", "fit": "train"}.get(stage, stage)

    # Batches

    def fields(self, batch: Any) -> Fields:
        """Return what ``batch`` holds, by who knows it first: the user's settings, ``gw_fields``, the default.

        Raises:
            PluginError: Nobody can read the batch.
        """
        given = self.settings.fields
        found = None if given is None else given(batch)
        if found is None and "gw_fields" in self.hooks.implemented:
            found = self.hooks.call("gw_fields", batch=batch)
        if found is None:
            found = default_fields(batch)
        if found is None:
            raise unknown_batch(batch)
        if not isinstance(found, Fields):
            raise PluginError(f"gw_fields must return Fields or None, got {type(found).__name__}")
        return found

    def loaders(self, stage: str) -> list[Any]:
        """Return the loaders of ``stage``, flat."""
        loaders = getattr(self.trainer, _LOADERS.get(stage, "predict_dataloaders"))
        # Asked for before every batch, and flattening costs more than all the rest.
        return [loaders] if isinstance(loaders, DataLoader) else flattened_loaders(loaders)

    def has_batch_start(self, stage: str) -> bool:
        """Tell whether anything happens at the start of a batch of ``stage``."""
        return bool(self.batch_starters or self.before_batch[stage] or self.before_forward[stage])

    def start_batch(self, start: BatchStart) -> None:
        """Do everything that comes before the forward passes of a batch."""
        for action in self.before_batch[start.stage]:
            action(start)
        self.first_results = self.call_batch_start(start.batch, start.stage, start.variant)
        for action in self.before_forward[start.stage]:
            action(start)

    def call_batch_start(
        self, batch: Any, stage: BatchStage, variant: str | None = None, first_results: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Call ``gw_batch_start``, each implementation with its own of ``first_results``.

        Returns:
            What each returned, by its name.
        """
        found = {}
        for name in self.batch_starters:
            first = None if first_results is None else first_results.get(name)
            arguments = {"batch": batch, "stage": stage, "variant": variant, "first_result": first}
            results = self.hooks.call("gw_batch_start", only=(name,), **arguments)
            found[name] = results[0] if results else None
        return found

    # Passes of core's and the plugins' own

    @contextmanager
    def extra_pass(self) -> Iterator[None]:
        """Context manager for forward passes that are not the step's own: nobody takes their scores for the batch's."""
        with ExitStack() as stack:
            for extra_pass in self.extra_passes:
                stack.enter_context(extra_pass())
            yield

    def forward(self, batch: Any) -> Any:
        """Return the module's outputs for ``batch``; see :meth:`groundwire.RunContext.forward`."""
        fields, module = self.fields(batch), self.module
        precision = self.trainer.precision_plugin.forward_context()
        with self.extra_pass(), without_trace(module, self.trainer), evaluating(module), torch.no_grad(), precision:
            return call_forward(module, batch, fields)

    # Loggers

    def log(self, key: str, value: Any, **kwargs: Any) -> None:
        """Log as ``self.log`` of the module does; where Lightning forbids that, send to the loggers.

        The class's own ``log``: an instance may be muted at the moment.
        """
        try:
            type(self.module).log(self.module, key, value, **kwargs)
        except Exception as error:
            if not is_misconfiguration(error):
                raise
            self.send({key: float(value)})

    def send(self, values: Mapping[str, float]) -> None:
        """Give ``values`` to the Trainer's loggers, which write on rank 0 only."""
        for logger in self.trainer.loggers if values else ():
            logger.log_metrics(dict(values), step=self.trainer.global_step)

    def close(self) -> None:
        """Take everything away that belongs to the run."""
        with self.undo:
            for action in self.before_close:
                action()
