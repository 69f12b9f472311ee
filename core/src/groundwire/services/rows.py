"""Letting plugins choose the training rows before Lightning builds its loader from the user's."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from groundwire._lightning import choosing_train_loader
from groundwire.distributed import gathered
from groundwire.errors import PluginError
from groundwire.service import Service
from groundwire.train_data import TrainData

_Choice = tuple[list[int] | None, list[float] | None]


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
            self._refuse_differences(data)
            return data.result()

        run.undo.enter_context(choosing_train_loader(run.trainer, choose, reload))

    def _refuse_differences(self, data: TrainData) -> None:
        """Refuse rows and weights that differ between ranks: each would train on its share of other rows.

        Raises:
            PluginError: With the first difference.
        """
        trainer = self.run.trainer
        chosen = data.choice()
        digest = blake2b(repr(chosen).encode()).digest() if trainer.world_size > 1 else b""
        if len(set(gathered(trainer, digest))) == 1:
            return
        owners = ", ".join(self.run.hooks.owners("gw_train_data"))
        choices = gathered(trainer, chosen)
        rank = next(rank for rank, other in enumerate(choices) if other != choices[0])
        difference = _difference(choices[0], choices[rank], rank)
        raise PluginError(
            f"gw_train_data of {owners}: {difference} -> decide from what all ranks know, for example from values "
            "gathered over them"
        )


def _difference(first: _Choice, other: _Choice, rank: int) -> str:
    """Return the first difference between what rank 0 and ``rank`` chose, in words."""
    for word, left, right in (("keeps", first[0], other[0]), ("weighs", first[1], other[1])):
        if left == right:
            continue
        if left is None or right is None:
            return f"rank {0 if right is None else rank} {word} rows, and rank {rank if right is None else 0} does not"
        if len(left) != len(right):
            return f"rank 0 {word} {len(left)} rows, and rank {rank} {len(right)}"
        place = next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
        if word == "keeps":
            return f"the kept row at place {place} is {left[place]} on rank 0 and {right[place]} on rank {rank}"
        return f"the weight of row {place} is {left[place]} on rank 0 and {right[place]} on rank {rank}"
    return "the choices differ"
