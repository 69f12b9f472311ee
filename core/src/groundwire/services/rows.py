"""Letting plugins choose the training rows before Lightning builds its loader from the user's."""

from __future__ import annotations

from typing import Any

from groundwire._lightning import choosing_train_loader
from groundwire.service import Service
from groundwire.train_data import TrainData


class RowService(Service):
    """Calls ``gw_train_data`` whenever the fit loop asks for the loader.

    That is after callback state was restored, so a plugin that decided before a resume knows its decision, and still
    before anything that counts batches.
    """

    name = "groundwire-rows"

    def open(self) -> None:
        """Step between the fit loop and where it gets its loader."""
        run = self.run
        if run.function != "fit" or not run.hooks.owners("gw_train_data"):
            return
        reload: list[int] = []

        def choose(loader: Any) -> Any:
            data = TrainData(loader, lambda: reload.append(run.trainer.current_epoch))
            run.hooks.call("gw_train_data", data=data)
            return data.result()

        run.undo.enter_context(choosing_train_loader(run.trainer, choose, reload))
