"""A plugin's view of the run that it is in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from groundwire._lightning import Trainer
from groundwire.errors import PluginError
from groundwire.records import Evaluation, Fields, Finding, Head, Variant
from groundwire.run import Run
from groundwire.undo.random_states import derive_seed


class RunContext:
    """The run, as one plugin sees it. It is valid while the run is open.

    Members that a service of core gives raise a PluginError where that service is not installed.

    Attributes:
        owner: Name of the plugin that holds this view.
    """

    __slots__ = ("_run", "owner")

    def __init__(self, run: Run, owner: str) -> None:
        self._run = run
        self.owner = owner

    def __deepcopy__(self, memo: Any) -> RunContext:
        """Return this view itself: a run is one, and a plugin that is copied during it may hold its view."""
        return self

    def _given(self, service: str, member: str) -> Any:
        try:
            return self._run.members[member]
        except KeyError:
            text = f"run.{member} needs the service {service!r} of groundwire, which is not installed"
            raise PluginError(text) from None

    @property
    def trainer(self) -> Trainer:
        """The user's Trainer."""
        return self._run.trainer

    @property
    def module(self) -> Any:
        """The user's LightningModule, never a wrapper of it."""
        return self._run.module

    @property
    def stage(self) -> str:
        """The running stage: "train", "validate" (also the sanity check), "test" or "predict"."""
        return self._run.stage

    @property
    def ready(self) -> bool:
        """True once model and optimizers exist."""
        return self._run.ready

    @property
    def step_seed(self) -> int:
        """A seed that is a function of the global seed and the global step: equal on all ranks and after a resume."""
        return derive_seed(self._run.seed, self._run.trainer.global_step)

    @property
    def head(self) -> Head | None:
        """The layer that produces the scores, once it is known: named in ``Plugins(head=...)`` or found by itself."""
        head: Head | None = self._given("scores", "head")
        return head

    @property
    def ids(self) -> list[int] | None:
        """Dataset indices of the current batch (needs ``needs_ids = True``); None where the loader has none."""
        ids: list[int] | None = self._given("sample_ids", "ids")
        return ids

    @property
    def features(self) -> Tensor | None:
        """Input of the head for the current batch, detached; needs ``needs_features = True``."""
        features: Tensor | None = self._given("scores", "features")
        return features

    @property
    def raw_scores(self) -> Tensor | None:
        """Scores of the current batch before any forward hook of a plugin on the head, float32, detached."""
        scores: Tensor | None = self._given("scores", "raw_scores")
        return scores

    @property
    def findings(self) -> list[Finding]:
        """All findings of the run so far, of this rank."""
        findings: list[Finding] = list(self._given("report", "findings").values())
        return findings

    @property
    def directory(self) -> Path | None:
        """Folder of this run's files; None where nothing is written (``fast_dev_run``, ``Plugins(report=False)``)."""
        directory: Path | None = self._given("report", "directory")
        return directory

    def fields(self, batch: Any) -> Fields:
        """Return what ``batch`` holds.

        Raises:
            PluginError: Nobody can read the batch.
        """
        return self._run.fields(batch)

    def loaders(self, stage: str | None = None) -> list[Any]:
        """Return the loaders of ``stage`` (the running one when left out), flat."""
        return self._run.loaders(stage or self.stage)

    def variants(self) -> list[Variant]:
        """Return the variants of the model that the run's plugins offer."""
        variants: list[Variant] = self._given("variants", "variants")()
        return variants

    def evaluate(self, variant: Variant | None = None, stage: str | None = None) -> Evaluation:
        """Evaluate ``variant`` (the model itself when None) on the running stage's loaders, with the Trainer's limits.

        Call it from ``gw_findings`` or at the end of a validation or test epoch, on all ranks. One pass through the
        data; ``gw_batch_start`` and ``gw_scores`` are called with the variant's name, and nothing else of the run
        changes.

        Raises:
            PluginError: No evaluation is going on, it is not that of ``stage``, or a loader can be read only once.
        """
        evaluation: Evaluation = self._given("variants", "evaluate")(variant, stage or self.stage)
        return evaluation

    def forward(self, batch: Any) -> Any:
        """Return what the module's ``forward`` gives for the inputs of ``batch``: one extra pass that leaves no trace.

        In evaluation mode, under the Trainer's precision, without gradients; its scores are not the batch's. A plugin
        whose forward hook moves the scores can so see whether a compiled module reaches it: two passes with different
        shifts must differ.

        Raises:
            PluginError: Nobody can read the batch.
        """
        return self._run.forward(batch)

    def extra_pass(self) -> AbstractContextManager[None]:
        """Context manager for forward passes of a plugin's own: their scores are not taken for the batch's."""
        return self._run.extra_pass()

    def aside(self) -> AbstractContextManager[None]:
        """Context manager under its old name; use :meth:`extra_pass`."""
        warnings.warn("run.aside is now run.extra_pass", DeprecationWarning, stacklevel=2)
        return self.extra_pass()

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Log ``value`` as ``"<plugin>/<name>"``; ``kwargs`` as for ``LightningModule.log``.

        Where Lightning does not allow ``self.log``, the value goes straight to the Trainer's loggers.
        """
        self._run.log(f"{self.owner}/{name}", value, **kwargs)

    def send(self, values: Mapping[str, float]) -> None:
        """Give ``values`` to the Trainer's loggers at once, each as ``"<plugin>/<name>"``, at this global step.

        For a series that ``log_every_n_steps`` would leave holes in. Nothing can monitor it: that is for :meth:`log`.
        """
        self._run.send({f"{self.owner}/{name}": value for name, value in values.items()})

    def on_close(self, callback: Callable[[], Any]) -> None:
        """Call ``callback()`` when the run closes, also after an exception; those given last are called first.

        It is called before the plugin's own ``teardown``, and after every callback's ``on_exception``, so that a
        checkpoint of a crash is of the run as it was. What it raises does not keep the rest from being undone.
        """
        self._run.undo.callback(callback)
