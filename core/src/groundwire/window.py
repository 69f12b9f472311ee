"""Recording the batches of one accumulation window, so that they can be run again.

Recorded right before the step: a callback would see the batch before the module and later callbacks edit it. Committed
when the backward starts, forgotten when gradients are zeroed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire._lightning import collect_rng_states, instance_attribute
from groundwire.errors import PluginError
from groundwire.types import MicroBatch


def copy_containers(value: Any) -> Any:
    """A copy of nested lists, tuples, dicts and dataclasses that shares every leaf.

    Example:
        >>> batch = {"x": [1, 2]}
        >>> twin = copy_containers(batch)
        >>> batch.pop("x"), twin
        ([1, 2], {'x': [1, 2]})
    """
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = copy_containers(item)
        return twin
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copy_containers, value))
    if type(value) in (list, tuple):
        return type(value)(map(copy_containers, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _copy_dataclass(value)
    return value


def _copy_dataclass(value: Any) -> Any:
    twin = copy.copy(value)
    for item in dataclasses.fields(value):
        if hasattr(value, item.name):
            object.__setattr__(twin, item.name, copy_containers(getattr(value, item.name)))
    return twin


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers.

    Example:
        >>> import torch
        >>> len(list(tensors_in([torch.zeros(1), {"y": torch.zeros(2)}])))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, f.name, None) for f in dataclasses.fields(value)])


@dataclasses.dataclass
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
    first_results: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def edited(self) -> list[nn.Parameter]:
        """Parameters that changed in place since: by the training step itself, as no optimizer stepped yet."""
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
    versions = tuple((t, t._version) for t in tensors_in(twin) if not t.is_inference())
    parameters = tuple((p, p._version) for p in module.parameters())
    return Recorded(MicroBatch(twin, batch_idx), collect_rng_states(), versions, parameters)


class Window:
    """The micro-batches that made the gradient of each optimizer: those since it was zeroed or stepped."""

    def __init__(self) -> None:
        self._pending: Recorded | None = None
        self._committed: list[Recorded] = []
        self._starts: dict[int, int] = {}

    def record(self, batch: Any, batch_idx: int, module: nn.Module) -> None:
        """Make ``batch`` the pending one."""
        self._pending = record(batch, batch_idx, module)

    def started(self, first_results: Mapping[str, Any]) -> None:
        """Note what ``gw_batch_start`` returned for the pending batch; it may have drawn random numbers."""
        if self._pending is not None and first_results:
            self._pending.first_results, self._pending.rng_states = first_results, collect_rng_states()

    def watching(self, optimizer: Optimizer, face: Any) -> AbstractContextManager[None]:
        """While open, ``face.zero_grad()`` begins the window of ``optimizer`` anew.

        Under manual optimization Lightning does not tell callbacks about it. ``face`` is what the user calls: the
        optimizer, Lightning's wrapper of it, or the module.
        """
        original = face.zero_grad
        self._starts[id(optimizer)] = len(self._committed)

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            self.clear(optimizer)
            original(*args, **kwargs)

        return instance_attribute(face, "zero_grad", zero_grad)

    def commit(self) -> None:
        """A backward of the pending batch starts."""
        if self._pending is not None:
            self._committed.append(self._pending)

    def of(self, optimizer: Optimizer, once: bool) -> list[Recorded]:
        """The window of ``optimizer``; ``once`` counts several backwards of one batch as one."""
        window = self._committed[self._starts.get(id(optimizer), 0) :]
        return list({id(recorded): recorded for recorded in window}.values()) if once else window

    def clear(self, optimizer: Optimizer) -> None:
        """The gradient of ``optimizer`` was zeroed or used; what no other optimizer waits for is forgotten."""
        self._starts[id(optimizer)] = len(self._committed)
        done = min(self._starts.values())
        del self._committed[:done]
        self._starts = {key: start - done for key, start in self._starts.items()}

    def close(self) -> None:
        """Let go of all batches."""
        self._committed.clear()
        self._starts.clear()
        self._pending = None
