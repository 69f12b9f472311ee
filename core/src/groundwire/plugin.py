"""The base class of plugins, and the bundle that holds several plugins and a run's settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from groundwire._lightning import Trainer as TrainerParts
from groundwire._lightning import state_key
from groundwire.hooks.ordering import name_of
from groundwire.host import open_run
from groundwire.records import Fields
from groundwire.run import Settings

_OPENS = "_groundwire_opens_run"


def _opening(setup: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``setup`` that opens the run first, so that an author who forgets ``super()`` loses nothing."""

    @functools.wraps(setup)
    def wrapped(self: Any, trainer: Any, pl_module: Any, stage: str) -> Any:
        open_run(trainer, pl_module, stage)
        return setup(self, trainer, pl_module, stage)

    setattr(wrapped, _OPENS, True)
    return wrapped


class Plugin(Callback):
    """A Lightning callback that also implements groundwire hooks.

    Subclass it, set ``name``, and mark hook implementations with ``@groundwire.hookimpl``. Everything that a callback
    can do stays available. The same object works alone in ``Trainer(callbacks=[...])`` and next to others.

    Attributes:
        name: How the plugin is called in order relations, logs, findings and checkpoints. The class name in lower
            case unless set; an instance may have its own.
        before: Names of plugins that must come after this one.
        after: Names of plugins that must come before this one.
        conflicts: Names of plugins that cannot be in the same run.
        requires: Names of plugins that must be in the same run.
        score_stages: Stages in which ``gw_scores`` is called: of "train", "validate", "test", "predict".
        needs_features: Set True to have ``run.features``, the head's input.
        needs_ids: Set True to have ``run.ids``, the dataset indices of the batch.
        head: Name of the layer that produces the scores, if the user told this plugin; found by itself when None.
        changes: ``"shift"`` for a plugin that adds to the scores a vector which no input of the batch moves; None when
            unknown. Its forward hook on the head says the same by an attribute of this name.
        loss_fn: ``loss_fn(module, batch) -> loss``, or with ``optimizer`` as third argument, for gradient
            owners under manual optimization, or None.

    Example:
        >>> from groundwire import Plugin, hookimpl, Problem
        >>> class Patience(Plugin):
        ...     name = "patience"
        ...     @hookimpl
        ...     def gw_check(self, run):
        ...         return [] if run.trainer.max_epochs != 0 else [Problem("patience", "max_epochs is 0")]
    """

    name: str = "plugin"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    score_stages: tuple[str, ...] = ("validate", "test")
    needs_features: bool = False
    needs_ids: bool = False
    head: str | None = None
    changes: Any = None
    opens_run: ClassVar[bool] = True
    loss_fn: Callable[..., Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not any("name" in vars(base) for base in cls.__mro__[: cls.__mro__.index(Plugin)]):
            cls.name = cls.__name__.lower()
        if not hasattr(cls.setup, _OPENS):
            cls.setup = _opening(cls.setup)  # type: ignore[method-assign]

    @property
    def state_key(self) -> str:
        """Lightning's key of this callback's state; an instance with a name of its own has a key of its own."""
        if self.name == type(self).name:
            return super().state_key
        return state_key(self, self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the run. An override need not call ``super().setup``."""
        open_run(_parts(trainer), pl_module, stage)


def _parts(trainer: Trainer) -> TrainerParts:
    # Lightning sets some of them where mypy does not see it.
    return cast(TrainerParts, trainer)


class Plugins(Callback):
    """Several plugins, and the settings of a run that no single plugin owns.

    The items behave exactly as if they were listed in the Trainer themselves.

    Args:
        items: The plugins (and other callbacks) of the run.
        off: Names of items to leave out of the run.
        fields: ``fields(batch) -> Fields`` (or None for "ask the next"), for batches that the default cannot read.
        head: Name of the layer that produces the scores, for example ``"net.4"``; found by itself when left out.
        report: Whether to write ``findings.json`` and ``report.html``.
        report_dir: Where to write them; ``<log_dir>/groundwire`` when left out.

    Example:
        >>> from groundwire import Plugins
        >>> Plugins(head="net.4").items
        []
    """

    def __init__(
        self,
        items: Sequence[Callback] = (),
        *,
        off: Sequence[str] = (),
        fields: Callable[[Any], Fields | None] | None = None,
        head: str | None = None,
        report: bool = True,
        report_dir: str | Path | None = None,
    ) -> None:
        if isinstance(items, Callback) or not all(hasattr(item, "on_fit_start") for item in items):
            raise TypeError(f"items must be a list of callbacks, got {items!r}")
        wrong = [item for item in items if isinstance(item, type)]
        if wrong:
            raise TypeError(f"items has the class {wrong[0].__name__} -> make one: {wrong[0].__name__}()")
        self.items = list(items)
        self.off = (off,) if isinstance(off, str) else tuple(off)
        self.fields = fields
        self.head = head
        self.report = report
        self.report_dir = report_dir

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the run and set up the items, which Lightning's loop over callbacks does not know yet."""
        host = open_run(_parts(trainer), pl_module, stage)
        for item in host.callback_list.items_in_order(self):
            item.setup(trainer, pl_module, stage)

    def bundled_settings(self) -> Settings:
        """Return the settings of the run."""
        return Settings(self.fields, self.head, self.report, self.report_dir)

    def on_save_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the items' state also after the run, when they are no longer in the Trainer's list."""
        for item in self.items:
            state = item.state_dict()
            if state and item not in trainer.callbacks and name_of(item) not in self.off:
                checkpoint.setdefault("callbacks", {})[item.state_key] = state
