"""Agreement between processes. Each method is called on all ranks, at places that all ranks reach equally often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from groundwire.distributed import gathered


class Processes:
    """The processes of a run; alone, every answer is one's own.

    Args:
        trainer: Of the run; None for no run.
    """

    def __init__(self, trainer: Any = None) -> None:
        initialized = trainer is not None and dist.is_available() and dist.is_initialized()
        self.world_size: int = trainer.world_size if initialized else 1
        self._trainer = trainer
        self._host: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        """Return ``value`` of every rank, in the order of the ranks."""
        return [value] if self.world_size == 1 else gathered(self._trainer, value)

    def earliest(self, step: int) -> int:
        """Return the smallest ``step`` of all ranks. It goes through the hosts, so that no device is waited for."""
        if self.world_size == 1:
            return step
        value = torch.tensor(step, dtype=torch.int64)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self._host_group())
        return int(value)

    def total(self, row: Tensor) -> Tensor:
        """Return the sum of ``row`` over all ranks."""
        if self.world_size == 1:
            return row
        row = row.clone()
        dist.all_reduce(row)
        return row

    def _host_group(self) -> Any:
        """Return the default group if it works on host memory, else one that does."""
        if dist.get_backend() == "gloo":
            return None
        if self._host is None:
            self._host = dist.new_group(backend="gloo")
        return self._host
