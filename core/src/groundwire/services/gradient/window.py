"""Recording the batches of one accumulation window, so that they can be run again.

Recorded right before the step: a callback would see the batch before the module and later callbacks edit it. Committed
when the backward starts, forgotten when gradients are zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire._lightning import collect_rng_states, instance_attribute
from groundwire.batch import copy_containers, tensors_in
from groundwire.errors import PluginError
from groundwire.records import MicroBatch


@dataclass
class Recorded:
    """A micro-batch with what tells whether, and how, it can be replayed.

    Attributes:
        micro_batch: The batch, its containers copied.
        rng_states: The global random states with which its step began.
        versions: Each tensor of the batch with its version.
        parameters: Each parameter of the module with its version.
        first_results: What each implementation of ``gw_batch_start`` returned for it, by name.
    """

    micro_batch: MicroBatch
    rng_states: dict[str, Any]
    versions: tuple[tuple[Tensor, int], ...]
    parameters: tuple[tuple[nn.Parameter, int], ...] = ()
    first_results: Mapping[str, Any] = field(default_factory=dict)

    def edited(self) -> list[nn.Parameter]:
        """Return the parameters that the training step itself changed in place; no optimizer stepped yet."""
        return [p for p, version in self.parameters if p._version != version]

    def refuse_if_edited(self) -> None:
        """Raise if ``training_step`` changed a tensor of the batch in place: the replay would see other data."""
        for tensor, version in self.versions:
            if tensor._version != version:
                raise PluginError(
                    f"training_step changed a tensor of batch {self.micro_batch.batch_idx} in place (shape "
                    f"{tuple(tensor.shape)}), so a replay would see other data -> write `x = x.add(...)` or clone it"
                )


def record(batch: Any, batch_idx: int, module: nn.Module) -> Recorded:
    """Remember ``batch`` as it is now, with the random states and the parameters' versions of now."""
    twin = copy_containers(batch)
    versions = tuple((t, t._version) for t in list(tensors_in(twin)) if not t.is_inference())
    parameters = tuple((p, p._version) for p in module.parameters())
    return Recorded(MicroBatch(twin, batch_idx), collect_rng_states(), versions, parameters)


class AccumulationWindow:
    """The micro-batches that made the gradient of each optimizer: those since it was zeroed or stepped."""

    def __init__(self) -> None:
        self._pending: Recorded | None = None
        self._committed: list[Recorded] = []
        self._starts: dict[int, int] = {}

    def record(self, batch: Any, batch_idx: int, module: nn.Module) -> None:
        """Make ``batch`` the pending one."""
        self._pending = record(batch, batch_idx, module)

    def note_results(self, first_results: Mapping[str, Any]) -> None:
        """Note what ``gw_batch_start`` returned for the pending batch; it may have drawn random numbers."""
        if self._pending is not None and first_results:
            self._pending.first_results, self._pending.rng_states = first_results, collect_rng_states()

    def restarted_by(self, optimizer: Optimizer, zeroing: Any) -> AbstractContextManager[None]:
        """Context manager in which ``zeroing.zero_grad()`` begins the window of ``optimizer`` anew.

        Under manual optimization Lightning does not tell callbacks about it. ``zeroing`` is what the user calls: the
        optimizer, Lightning's wrapper of it, or the module.
        """
        original = zeroing.zero_grad
        self._starts[id(optimizer)] = len(self._committed)

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            self.clear(optimizer)
            original(*args, **kwargs)

        return instance_attribute(zeroing, "zero_grad", zero_grad)

    def commit(self) -> None:
        """Add the pending batch, whose backward starts."""
        if self._pending is not None:
            self._committed.append(self._pending)

    def of(self, optimizer: Optimizer, once: bool) -> list[Recorded]:
        """Return the window of ``optimizer``; ``once`` counts several backwards of one batch as one."""
        window = self._committed[self._starts.get(id(optimizer), 0) :]
        return list({id(recorded): recorded for recorded in window}.values()) if once else window

    def clear(self, optimizer: Optimizer) -> None:
        """Forget what made the gradient of ``optimizer``, zeroed or used now, unless another optimizer waits for it."""
        self._starts[id(optimizer)] = len(self._committed)
        done = min(self._starts.values())
        del self._committed[:done]
        self._starts = {key: start - done for key, start in self._starts.items()}

    def close(self) -> None:
        """Let go of all batches."""
        self._committed.clear()
        self._starts.clear()
        self._pending = None
