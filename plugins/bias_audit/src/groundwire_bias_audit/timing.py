"""When versions of the model are evaluated; the same on all processes."""

from __future__ import annotations

from typing import Any


def due(trainer: Any, every_n_epochs: int | None) -> bool:
    """Whether this pass is one of those: every n-th epoch's, the last epoch's, and any outside of ``fit``."""
    if str(trainer.state.fn.value) != "fit":
        return True
    epoch = trainer.current_epoch + 1
    if every_n_epochs is not None:
        return bool(epoch % every_n_epochs == 0)
    return bool(epoch == trainer.max_epochs or trainer.should_stop)


def last(trainer: Any, every_n_epochs: int | None) -> bool:
    """Whether no later pass of this run is one of those."""
    if str(trainer.state.fn.value) != "fit" or trainer.should_stop:
        return True
    every, validated = every_n_epochs or 1, trainer.check_val_every_n_epoch or 1
    later = range(trainer.current_epoch + 2, (trainer.max_epochs or 0) + 1)
    return not any(epoch % every == 0 and epoch % validated == 0 for epoch in later)
