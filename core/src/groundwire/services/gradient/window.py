"""Recording the batches of one accumulation window, so that they can be run again.

Recorded right before the step: a callback would see the batch before the module and later callbacks edit it. Committed
when the backward starts, forgotten when the gradient that they made is found to be gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire._lightning import (
    LoggedMetrics,
    Trainer,
    collect_rng_states,
    instance_attribute,
    logged_metrics,
)
from groundwire.batch import contents, copy_containers, parts_of
from groundwire.errors import PluginError
from groundwire.records import MicroBatch


@dataclass
class Recorded:
    """A micro-batch with what tells whether, and how, it can be replayed.

    Attributes:
        micro_batch: The batch, its containers and objects copied.
        rng_states: The global random states with which its step began.
        versions: Each tensor of the batch with the class of the object that holds it and its version.
        shared: Each object that could not be copied, and each container in one, with its class and what it held.
        parameters: Each parameter of the module with its version.
        metrics: The Trainer's metrics with which its step began.
        first_results: What each implementation of ``gw_batch_start`` returned for it, by name.
    """

    micro_batch: MicroBatch
    rng_states: dict[str, Any]
    versions: tuple[tuple[str, Tensor, int], ...]
    shared: tuple[tuple[str, Any, dict[Any, Any]], ...]
    parameters: tuple[tuple[nn.Parameter, int], ...]
    metrics: LoggedMetrics
    first_results: Mapping[str, Any] = field(default_factory=dict)

    def edited(self) -> list[nn.Parameter]:
        """Return the parameters that the training step itself changed in place; no optimizer stepped yet."""
        return [p for p, version in self.parameters if p._version != version]

    def batch(self) -> Any:
        """Return the batch for one more pass, in containers and objects of its own.

        Raises:
            PluginError: ``training_step`` changed a tensor of the batch in place, or an object that cannot be copied:
                the pass would see other data.
        """
        number = self.micro_batch.batch_idx
        for owner, value, before in self.shared:
            now = contents(value)
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in now):
                raise PluginError(
                    f"training_step changed a {owner} of batch {number}, which does not let itself be copied, so a "
                    f"replay would see other data -> give {owner} a __copy__, or keep new values in variables"
                )
        for owner, tensor, version in self.versions:
            if tensor._version != version:
                raise PluginError(
                    f"training_step changed a tensor of batch {number} in place (shape {tuple(tensor.shape)}, in a "
                    f"{owner}), so a replay would see other data -> write `x = x.add(...)` or clone it"
                )
        return copy_containers(self.micro_batch.batch)


def record(batch: Any, batch_idx: int, module: nn.Module, trainer: Trainer) -> Recorded:
    """Remember ``batch`` as it is now, with the random states, metrics and versions of parameters of now."""
    uncopied: list[Any] = []
    twin = copy_containers(batch, uncopied)
    tensors = [(owner, part) for owner, part in parts_of(twin) if isinstance(part, Tensor)]
    shared = [(type(value).__name__, part) for value in uncopied for _, part in parts_of(value)]
    return Recorded(
        MicroBatch(twin, batch_idx),
        collect_rng_states(),
        tuple((owner, tensor, tensor._version) for owner, tensor in tensors if not tensor.is_inference()),
        tuple((owner, part, found) for owner, part in shared if (found := contents(part))),
        tuple((p, p._version) for p in module.parameters()),
        logged_metrics(trainer),
    )


class AccumulationWindow:
    """The micro-batches that made the gradient of each optimizer: those since it was zeroed.

    When a backward starts, a gradient that is None was zeroed. One that is zero was, too: it is looked at where
    somebody may have zeroed it, at the first backward after a step and after Lightning's call to zero it.
    """

    def __init__(self) -> None:
        self._pending: Recorded | None = None
        self._committed: list[Recorded] = []
        self._starts: dict[int, int] = {}
        self._optimizers: dict[int, Optimizer] = {}
        self._doubtful: set[int] = set()
        self._used: set[int] = set()

    def begin(self, optimizers: Iterable[Optimizer]) -> None:
        """Keep a window for each of ``optimizers``."""
        self._optimizers = {id(optimizer): optimizer for optimizer in optimizers}
        self._starts = dict.fromkeys(self._optimizers, 0)
        self._doubtful = set(self._optimizers)

    def record(self, batch: Any, batch_idx: int, module: nn.Module, trainer: Trainer) -> None:
        """Make ``batch`` the pending one."""
        self._pending = record(batch, batch_idx, module, trainer)

    def note_results(self, first_results: Mapping[str, Any]) -> None:
        """Note what ``gw_batch_start`` returned for the pending batch; it may have drawn random numbers."""
        if self._pending is not None and first_results:
            self._pending.first_results, self._pending.rng_states = first_results, collect_rng_states()

    def watching(self, optimizer: Optimizer, zeroing: Any) -> AbstractContextManager[None]:
        """Context manager that looks at the gradient of ``optimizer`` again after ``zeroing.zero_grad()``.

        Under manual optimization Lightning does not tell callbacks about it. ``zeroing`` is what the user calls: the
        optimizer, Lightning's wrapper of it, or the module.
        """
        original = zeroing.zero_grad

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            self.doubt(optimizer)
            original(*args, **kwargs)

        return instance_attribute(zeroing, "zero_grad", zero_grad)

    def doubt(self, optimizer: Optimizer) -> None:
        """Look at the gradient of ``optimizer`` when the next backward starts: it may be zeroed until then."""
        self._doubtful.add(id(optimizer))

    def commit(self) -> None:
        """Add the pending batch, whose backward starts, to the windows of gradients that are still there."""
        for key, optimizer in self._optimizers.items():
            if _zeroed(optimizer, look=key in self._doubtful):
                self._starts[key] = len(self._committed)
        self._doubtful.clear()
        self._used.clear()
        done = min(self._starts.values(), default=0)
        del self._committed[:done]
        self._starts = {key: start - done for key, start in self._starts.items()}
        if self._pending is not None:
            self._committed.append(self._pending)

    def of(self, optimizer: Optimizer, once: bool) -> list[Recorded]:
        """Return the window of ``optimizer``, empty if it used that gradient before.

        Args:
            optimizer: It is about to step.
            once: Count several backwards of one batch as one.
        """
        window = [] if id(optimizer) in self._used else self._committed[self._starts.get(id(optimizer), 0) :]
        return list({id(recorded): recorded for recorded in window}.values()) if once else window

    def use(self, optimizer: Optimizer) -> None:
        """Note that ``optimizer`` steps with its gradient now."""
        self._used.add(id(optimizer))
        self.doubt(optimizer)

    def close(self) -> None:
        """Let go of all batches and optimizers."""
        self.__init__()  # type: ignore[misc]


def _zeroed(optimizer: Optimizer, look: bool) -> bool:
    """Tell whether the optimizer has no gradient, or, where ``look`` says that this is worth it, only zeros."""
    grads = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    if not look:
        return next(grads, None) is None
    return not any(bool(grad.any()) for grad in grads)
