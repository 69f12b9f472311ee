"""An extra gradient pass: one more forward and backward over the window that made the gradient.

It runs in ``on_before_optimizer_step``, where the gradient is accumulated, reduced, unscaled and not yet clipped.
Lightning then clips once and the user's own optimizer steps once; nothing is wrapped.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire._lightning import (
    closure_loss,
    gradient_scaler,
    gradients_are_views,
    instance_attribute,
    set_rng_states,
    showing_metrics,
    step_arguments,
    without_sync,
)
from groundwire.errors import PluginError
from groundwire.finite import all_finite
from groundwire.modules import overrides
from groundwire.records import GradientStep, LossFn, MicroBatch
from groundwire.run import Run
from groundwire.services.gradient.window import Recorded
from groundwire.undo.random_states import derive_seed, seed_globals
from groundwire.undo.snapshot import parameters_restored
from groundwire.undo.without_trace import without_trace

MANUAL = (
    "the module uses manual optimization, where a replay of training_step would step the optimizers again -> give "
    "the plugin loss_fn=lambda module, batch: ..., which returns the loss that this optimizer minimises"
)


class ReplayableStep(GradientStep):
    """A step that can run its accumulation window again; see :class:`groundwire.GradientStep`.

    Args:
        run: The run.
        optimizer: The optimizer that is about to step.
        parameters: Its parameters by name.
        window: The recorded micro-batches.
        backward_done: Called when the backward passes of a replay are done.
        loss_fn: The owner's, used where :meth:`replay` is given none.
    """

    def __init__(
        self,
        run: Run,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        window: Iterable[Recorded],
        backward_done: Callable[[], None],
        loss_fn: LossFn | None = None,
    ) -> None:
        self._run, self._trainer, self._module = run, run.trainer, run.module
        self._backward_done, self._loss_fn = backward_done, loss_fn
        self._saved: list[nn.Parameter] = []
        self._window = tuple(window)
        self._edited = self._window[0].edited() if self._window else []
        self.views = gradients_are_views(run.trainer)
        self.optimizer = optimizer
        self.parameters = dict(parameters)
        self.grads: dict[str, Tensor] = self._own_gradients()
        self.finite = True

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """See :attr:`groundwire.GradientStep.micro_batches`."""
        return tuple(recorded.micro_batch for recorded in self._window)

    @contextmanager
    def perturbed(
        self, names: Iterable[str] | None = None, *, saved: dict[str, Tensor] | None = None
    ) -> Iterator[dict[str, nn.Parameter]]:
        """See :meth:`groundwire.GradientStep.perturbed`."""
        names = list(self.grads if names is None else names)
        unknown = [name for name in names if name not in self.parameters]
        if unknown:
            raise KeyError(f"no such parameters of this optimizer: {unknown}; it has {list(self.parameters)}")
        weights = {name: self.parameters[name] for name in names}
        if saved is None:
            saved = {name: weight.detach().clone() for name, weight in weights.items()}
        outer, self._saved = self._saved, [*self._saved, *weights.values()]
        try:
            with torch.no_grad():
                yield weights
        finally:
            self._saved = outer
            with torch.no_grad():
                for name, copy in saved.items():
                    weights[name].copy_(copy)

    def replay(self, loss_fn: LossFn | None = None, *, same_rng: bool = False) -> dict[str, Tensor]:
        """See :meth:`groundwire.GradientStep.replay`."""
        loss_fn = loss_fn or self._loss_fn
        if loss_fn is None and not self._module.automatic_optimization:
            raise PluginError(MANUAL)
        if not self._window:
            raise PluginError("there is no recorded batch to replay -> only the owner of gw_gradient may replay")
        wrong = loss_function_problem(loss_fn)
        if wrong:
            raise PluginError(" -> ".join(wrong))
        batches = [recorded.batch() for recorded in self._window]
        parameters = parameters_restored(self._module, self._edited, self._saved)
        around = [callback for callback in self._trainer.callbacks if _acts_around_a_backward(callback)]
        trace = without_trace(self._module, self._trainer, also=around)
        with trace, parameters, self._gradients_set_apart():
            self._backward(batches, loss_fn, same_rng)
            self._backward_done()
            found = self._collect()
        self.finite = self.finite and all_finite(found.values())
        return found

    def _own_gradients(self) -> dict[str, Tensor]:
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        return {name: grad.clone() for name, grad in grads.items()} if self.views else grads

    @contextmanager
    def _gradients_set_apart(self) -> Iterator[None]:
        """Context manager without any gradient on module and optimizers, so that the pass allocates its own."""
        groups = [group["params"] for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        before = [(p, p.grad) for p in {*self._module.parameters(), *itertools.chain(*groups)}]
        for parameter, _ in before:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, grad in before:
                parameter.grad = grad

    def _backward(self, batches: list[Any], loss_fn: LossFn | None, same_rng: bool) -> None:
        last = len(batches) - 1
        with torch.enable_grad():
            for number, (batch, recorded) in enumerate(zip(batches, self._window, strict=True)):
                self._run.call_batch_start(batch, "train", None, recorded.first_results)  # before seeding: it may draw
                if same_rng:
                    set_rng_states(recorded.rng_states)
                else:
                    seed_globals(derive_seed(self._run.seed, self._trainer.global_step, number))
                sync = without_sync(self._trainer, block=number < last)
                with sync, showing_metrics(self._trainer, recorded.metrics):
                    loss = self._loss(batch, recorded.micro_batch.batch_idx, loss_fn)
                    if loss is not None:
                        # Scales it, and calls the user's hooks before and after a backward and their own backward.
                        automatic = self._module.automatic_optimization
                        self._trainer.strategy.backward(loss, self.optimizer if automatic else None)

    def _loss(self, batch: Any, batch_idx: int, loss_fn: LossFn | None) -> Tensor | None:
        strategy = self._trainer.strategy
        arguments = step_arguments(self._trainer, batch, batch_idx)
        loss: Tensor | None
        if loss_fn is None:
            loss = closure_loss(strategy.training_step(*arguments))
        else:
            given = (self.optimizer,) if _positional(loss_fn) == 3 else ()
            with ExitStack() as in_place_of_step:
                # So that the strategy sends it through DDP and autocast as it does the step, which it may itself call.
                def step(batch: Any, *_: Any) -> Tensor:
                    in_place_of_step.close()
                    return _checked(loss_fn(self._module, batch, *given))

                in_place_of_step.enter_context(instance_attribute(self._module, "training_step", step))
                loss = strategy.training_step(*arguments)
        if loss is None or not self._module.automatic_optimization:
            return loss
        divisor: int = self._trainer.accumulate_grad_batches
        return loss / divisor

    def _collect(self) -> dict[str, Tensor]:
        scaler = gradient_scaler(self._trainer)
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if scaler is not None:
            for grad in found.values():
                grad.mul_(1.0 / scaler.get_scale())
        return {name: grad.clone() for name, grad in found.items()} if self.views else found


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
        raise PluginError(f"loss_fn must return the loss, one number with a gradient, got {loss!r}")
    return loss


def loss_function_problem(loss_fn: Any) -> tuple[str, str] | None:
    """Return what is wrong with a ``loss_fn``, and what to do; None if nothing is.

    Example:
        >>> loss_function_problem(lambda module, batch: 0)
        >>> loss_function_problem(lambda batch: 0)[0]
        'loss_fn takes 1 positional arguments'
    """
    if loss_fn is None or _positional(loss_fn) in (2, 3):
        return None
    hint = "write loss_fn(module, batch), or loss_fn(module, batch, optimizer) to be told which optimizer steps"
    if _positional(loss_fn) is None:
        return f"loss_fn={loss_fn!r} is no function whose arguments can be told", hint
    return f"loss_fn takes {_positional(loss_fn)} positional arguments", hint


def _positional(function: Any) -> int | None:
    """Return the number of positional parameters of ``function``; None if there is no telling.

    A third one with a default counts only if it is called ``optimizer``: another one is an option of the user's own.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in parameters}
    required = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if inspect.Parameter.VAR_POSITIONAL in kinds or required:
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(1 for place, p in enumerate(positional) if place < 2 or p.default is p.empty or p.name == "optimizer")


def _acts_around_a_backward(callback: Any) -> bool:
    return overrides(callback, "on_before_backward") or overrides(callback, "on_after_backward")
