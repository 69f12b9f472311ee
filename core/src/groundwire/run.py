"""What a plugin holds of the run that it is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from groundwire.seeds import derive_seed
from groundwire.types import Evaluation, Fields, Finding, Head, Variant

if TYPE_CHECKING:
    from groundwire.host import Host


class RunContext:
    """The run, as one plugin sees it. It is valid while the run is open.

    Attributes:
        owner: Name of the plugin that holds this view.
    """

    __slots__ = ("_host", "owner")

    def __init__(self, host: Host, owner: str) -> None:
        self._host = host
        self.owner = owner

    @property
    def trainer(self) -> Any:
        """The user's Trainer."""
        return self._host.trainer

    @property
    def module(self) -> Any:
        """The user's LightningModule, never a wrapper of it."""
        return self._host.module

    @property
    def stage(self) -> str:
        """What runs now: "train", "validate" (also the sanity check), "test" or "predict"."""
        return self._host.stage

    @property
    def ready(self) -> bool:
        """Whether model and optimizers exist."""
        return self._host.ready

    @property
    def step_seed(self) -> int:
        """A seed that is a function of the global seed and the global step: equal on all ranks and after a resume."""
        return derive_seed(self._host.seed, self._host.trainer.global_step)

    @property
    def head(self) -> Head | None:
        """The layer that produces the scores, once it is known: named in ``Plugins(head=...)`` or found by itself."""
        return self._host.scores.head

    @property
    def ids(self) -> list[int] | None:
        """Dataset indices of the current batch (needs ``needs_ids = True``); None where the loader has none."""
        return self._host.ids.current

    @property
    def features(self) -> Tensor | None:
        """Input of the head for the current batch, detached; needs ``needs_features = True``."""
        return self._host.scores.features

    @property
    def raw_scores(self) -> Tensor | None:
        """Scores of the current batch before any forward hook of a plugin on the head, float32, detached."""
        return self._host.scores.raw

    @property
    def findings(self) -> list[Finding]:
        """All findings of the run so far, of this rank."""
        return list(self._host.findings.all)

    @property
    def directory(self) -> Path | None:
        """Where files of this run go; None where nothing is written (``fast_dev_run``, ``Plugins(report=False)``)."""
        return self._host.findings.directory

    def fields(self, batch: Any) -> Fields:
        """What ``batch`` holds.

        Raises:
            PluginError: Nobody can read the batch.
        """
        return self._host.fields(batch)

    def variants(self) -> list[Variant]:
        """Other versions of the model that the run's plugins offer."""
        return self._host.variants()

    def evaluate(self, variant: Variant | None = None, stage: str | None = None) -> Evaluation:
        """Evaluate ``variant`` (the model itself when None) on the running stage's loaders, with the Trainer's limits.

        Call it from ``gw_findings`` or at the end of a validation or test epoch, on all ranks. One pass through the
        data; ``gw_batch_start`` and ``gw_scores`` are called with the variant's name, and nothing else of the run
        changes.

        Raises:
            PluginError: No evaluation is going on, it is not that of ``stage``, or a loader can be read only once.
        """
        return self._host.evaluate(variant, stage or self.stage)

    def aside(self) -> AbstractContextManager[None]:
        """Forward passes of the module meanwhile are not the step's own: their scores are not the batch's."""
        return self._host.scores.aside()

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Log ``value`` as ``"<plugin>/<name>"``; ``kwargs`` as for ``LightningModule.log``.

        Where Lightning does not allow ``self.log``, the value goes straight to the Trainer's loggers.
        """
        self._host.log(f"{self.owner}/{name}", value, **kwargs)

    def send(self, values: Mapping[str, float]) -> None:
        """Give ``values`` to the Trainer's loggers at once, each as ``"<plugin>/<name>"``, at this global step.

        For a series that ``log_every_n_steps`` would leave holes in. Nothing can monitor it: that is for :meth:`log`.
        """
        self._host.findings.send({f"{self.owner}/{name}": value for name, value in values.items()})

    def forward(self, batch: Any) -> Any:
        """Return what the module's ``forward`` gives for the inputs of ``batch``: one extra pass that leaves no trace.

        In evaluation mode, under the Trainer's precision, without gradients; its scores are not the batch's. A plugin
        whose forward hook moves the scores can so see whether a compiled module reaches it: two passes with different
        shifts must differ.

        Raises:
            PluginError: Nobody can read the batch.
        """
        return self._host.forward(batch)

    def on_close(self, callback: Callable[[], Any]) -> None:
        """Call ``callback()`` when the run closes, also after an exception; those given last are called first.

        It is called before the plugin's own ``teardown`` or ``on_exception``. What it raises does not keep the rest
        from being undone.
        """
        self._host.stack.callback(callback)
