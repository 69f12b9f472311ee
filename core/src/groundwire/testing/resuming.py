"""A fit in one piece, and the same fit interrupted and taken up again by new objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from groundwire.testing.fitting import Fit, differences, fit, listed, make_trainer, train
from groundwire.testing.isolation import seeded
from groundwire.testing.loaders import stateful


@dataclass(frozen=True)
class Resumed:
    """Two fits that should have ended in the same place.

    Attributes:
        interrupted: The fit of two pieces, with a new Trainer, module, loader and plugin in the second.
        uninterrupted: The fit of one piece.
        checkpoint: The file between the two pieces.
    """

    interrupted: Fit
    uninterrupted: Fit
    checkpoint: Path

    @property
    def differences(self) -> list[str]:
        """Weights, buffers and optimizer state that are not bit-equal; see :func:`differences`."""
        return differences(self.interrupted.tensors, self.uninterrupted.tensors)


class Interrupted(Exception):  # noqa: N818 - not an error
    """The first piece ends here."""


class Interruption(Callback):
    """Saves a checkpoint and ends the run, as if the process had died right after."""

    def __init__(self, path: Path, step: int | None) -> None:
        self._path, self._step = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After optimizer step ``step``."""
        if trainer.global_step == self._step:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """After the first epoch, if no step was given."""
        if self._step is None:
            self._end(trainer)

    def _end(self, trainer: Any) -> None:
        trainer.save_checkpoint(self._path)
        raise Interrupted


def resume(
    factory: Callable[[], Any],
    module: Callable[[], Any],
    directory: Path,
    *,
    stop_after: int | None = 3,
    loader: Callable[[Any], Any] = stateful,
    **options: Any,
) -> Resumed:
    """Fit in one piece and in two.

    Args:
        factory: Makes the callbacks (one, or several in a list).
        module: Makes the module.
        directory: Where the Trainers write.
        stop_after: Optimizer steps of the first piece; None for its first epoch.
        loader: Makes the training loader of a module; the kit's stateful one when left out.
        options: Of the Trainers.
    """
    path = directory / "interrupted.ckpt"

    def made() -> Any:
        with seeded():
            return module()

    whole = made()
    uninterrupted = fit(factory(), whole, directory, loader=loader(whole), **options)
    first = made()
    trainer = make_trainer(first, [*listed(factory()), Interruption(path, stop_after)], directory, **options)
    try:
        train(trainer, first, loader=loader(first))
    except Interrupted:
        second = made()
        trainer = make_trainer(second, factory(), directory, **options)
        train(trainer, second, loader=loader(second), ckpt_path=path)
        return Resumed(Fit(trainer, second, directory), uninterrupted, path)
    raise ValueError(f"the fit was over before stop_after={stop_after} optimizer steps")
