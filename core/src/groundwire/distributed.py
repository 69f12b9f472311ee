"""Values of all processes of a run, gathered."""

from __future__ import annotations

from typing import Any

import torch

from groundwire._lightning import Trainer


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """Return ``value`` of every process, in the order of the ranks. All of them must call it.

    Lightning's own ``all_gather`` takes tensors of equal shape only; this takes whatever can be pickled.

    Args:
        trainer: The Trainer of the run; alone, it gives ``[value]``.
        value: This process's own.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> gathered(Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False), {"rows": 3})
        [{'rows': 3}]
    """
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
