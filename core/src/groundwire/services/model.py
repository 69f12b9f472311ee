"""Letting plugins change the model's structure at the only right moment.

The model may exist before the run, be built in ``LightningModule.setup``, or in ``configure_model``; weights are
restored and optimizers made right after. So the hook runs once at opening and once more behind each of them. A
wrapper does not survive pickle, so it is gone before training starts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from groundwire._lightning import instance_attribute, is_averaging, spawns_processes
from groundwire.errors import Problem, problems_error
from groundwire.hooks.changed_models import remember
from groundwire.hooks.markers import hookimpl
from groundwire.modules import overrides
from groundwire.run import Run
from groundwire.service import Service


class ModelService(Service):
    """Calls ``gw_transform_model``, now and after the user's own ``setup`` and ``configure_model``."""

    name = "groundwire-model"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._late_build = ExitStack()

    @hookimpl(tryfirst=True)
    def gw_check(self) -> list[Problem]:
        """Refuse averaging callbacks that copied the model before it changes."""
        run = self.run
        owners = ", ".join(run.hooks.owners("gw_transform_model"))
        if run.ready or run.function != "fit" or not owners:
            return []
        return [
            Problem(
                "groundwire",
                f"{type(callback).__qualname__} is listed before the plugins, so it copied the model before {owners} "
                "changed it",
                "list it after them",
            )
            for callback in run.listed_before
            if is_averaging(callback)
        ]

    def open(self) -> None:
        """Transform now, and again when the user's own methods have built the model."""
        module = self.run.module
        remember(module, self.run.plugins)
        if not self.run.hooks.owners("gw_transform_model"):
            return
        self.run.undo.enter_context(self._late_build)
        self._transform()
        for name in ("setup", "configure_model"):
            # A wrapper around Lightning's own empty method would look like an override and cause warnings.
            if overrides(module, name):
                self._late_build.enter_context(instance_attribute(module, name, self._then_transform(name)))

    def model_is_built(self) -> None:
        """Take the wrappers away."""
        self._late_build.close()

    def _then_transform(self, name: str) -> Callable[..., None]:
        original = getattr(self.run.module, name)

        def build(*args: object, **kwargs: object) -> None:
            original(*args, **kwargs)
            self._transform()

        return build

    def _transform(self) -> None:
        run = self.run
        before = set(run.module.state_dict()) if spawns_processes(run.trainer) else None
        run.hooks.call("gw_transform_model", module=run.module)
        if before is not None and set(run.module.state_dict()) != before:
            owners, strategy = ", ".join(run.hooks.owners("gw_transform_model")), type(run.trainer.strategy).__name__
            text = (
                f"the model would change in the child processes of {strategy} only, and this process would silently "
                "keep initial weights"
            )
            hint = "transform the model before fit, or use strategy='ddp'"
            raise problems_error([Problem(owners, text, hint)])
