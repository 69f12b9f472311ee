"""What all processes of a run know together."""

from __future__ import annotations

from typing import Any

import torch


def gathered(trainer: Any, value: Any) -> list[Any]:
    """``value`` of every process."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
