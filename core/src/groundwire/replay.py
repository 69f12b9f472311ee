"""The extra-gradient-pass service: one more forward and backward over the window that made the gradient.

It runs in ``on_before_optimizer_step``, where the gradient is accumulated, reduced, unscaled and not yet clipped.
Lightning then clips once and the user's own optimizer steps once; nothing is wrapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    step_arguments,
    without_sync,
)
from groundwire.errors import PluginError
from groundwire.guard import parameters_kept, unseen
from groundwire.seeds import derive_seed, seed_globals
from groundwire.types import MicroBatch
from groundwire.window import Recorded

LossFn = Callable[[Any, Any], Tensor]


class GradientStep:
    """One optimizer step whose gradient is complete: accumulated, reduced over ranks, unscaled, not yet clipped.

    Attributes:
        parameters: The optimizer's parameters by name in ``module.named_parameters()``; a tied one appears once.
        grads: Gradient of each parameter that has one, writable.
        micro_batches: The batches of the accumulation window.
        optimizer: The optimizer that is about to step.
        finite: False as soon as a replay of this step produced a non-finite gradient.
        views: Whether the gradients of the parameters are views of DDP buckets (then :attr:`grads` holds copies).
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        window: Iterable[Recorded],
        seed: int,
        start: Callable[[Recorded], None],
        done: Callable[[], None],
        loss_fn: LossFn | None = None,
    ) -> None:
        self._loss_fn = loss_fn
        self._trainer, self._module, self._seed = trainer, module, seed
        self._start, self._done = start, done
        self._saved: list[nn.Parameter] = []
        self._window = tuple(window)
        self._edited = self._window[0].edited() if self._window else []
        self.views = gradients_are_views(trainer)
        self.optimizer = optimizer
        self.parameters = dict(parameters)
        self.grads: dict[str, Tensor] = self._own_gradients()
        self.finite = True

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """The batches of the accumulation window, in order."""
        return tuple(recorded.micro_batch for recorded in self._window)

    @contextmanager
    def perturbed(
        self, names: Iterable[str] | None = None, *, saved: dict[str, Tensor] | None = None
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Save parameters, hand them out for in-place edits (gradients are off), and restore them, whatever happens.

        Args:
            names: The parameters that will be changed; all that have a gradient when left out.
            saved: For a kernel that saves and restores while it edits: an empty dict, in which the caller puts the
                copy of a parameter before it changes it and from which it takes what it has restored itself. Nothing
                is copied here then; what the dict holds at the end is restored.

        Yields:
            The saved parameters by name. Edit them in place: ``weights[name].add_(...)``.

        Raises:
            KeyError: A name is not one of :attr:`parameters`.
        """
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
        """Gradient of the window's loss at the current weights; :attr:`grads` and all other state stay as they are.

        Args:
            loss_fn: ``loss_fn(module, batch) -> scalar`` used instead of ``training_step``; the plugin's own attribute
                ``loss_fn`` when left out. Required under manual optimization, where ``training_step`` would step
                again, and then taken as it is (not divided by the number of accumulated batches).
            same_rng: Use the first pass's dropout masks instead of fresh ones, which are seeded by
                (seed, global_step, micro-batch).

        Returns:
            New gradients by parameter name, unscaled and reduced over ranks. A parameter that this pass did not
            reach is missing.

        Raises:
            PluginError: Manual optimization without ``loss_fn``, a batch that was edited in place, or a caller other
                than the owner of ``gw_gradient`` in a run without one.
        """
        loss_fn = loss_fn or self._loss_fn
        if loss_fn is None and not self._module.automatic_optimization:
            raise PluginError(MANUAL)
        if not self._window:
            raise PluginError("there is no recorded batch to replay -> only the owner of gw_gradient may replay")
        for recorded in self._window:
            recorded.refuse_if_edited()
        kept = parameters_kept(self._module, self._edited, self._saved)
        with unseen(self._module, self._trainer), kept, self._gradients_aside():
            self._backward(loss_fn, same_rng)
            self._done()
            found = self._collect()
        self.finite = self.finite and all_finite(found.values())
        return found

    def _own_gradients(self) -> dict[str, Tensor]:
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        return {name: grad.clone() for name, grad in grads.items()} if self.views else grads

    @contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """Every gradient of the module is out of the way, so that the pass allocates its own."""
        before = [(p, p.grad) for p in self._module.parameters()]
        for parameter, _ in before:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, grad in before:
                parameter.grad = grad

    def _backward(self, loss_fn: LossFn | None, same_rng: bool) -> None:
        last = len(self._window) - 1
        with torch.enable_grad():
            for number, recorded in enumerate(self._window):
                self._start(recorded)  # before seeding: it may draw
                if same_rng:
                    set_rng_states(recorded.rng_states)
                else:
                    seed_globals(derive_seed(self._seed, self._trainer.global_step, number))
                with without_sync(self._trainer, block=number < last):
                    self._backward_once(recorded.micro_batch, loss_fn)

    def _backward_once(self, micro_batch: MicroBatch, loss_fn: LossFn | None) -> None:
        loss = self._loss(micro_batch, loss_fn)
        if loss is None:
            return
        strategy = self._trainer.strategy
        strategy.pre_backward(loss)
        scaler = gradient_scaler(self._trainer)
        self._module.backward(loss if scaler is None else scaler.scale(loss))
        strategy.post_backward(loss)

    def _loss(self, micro_batch: MicroBatch, loss_fn: LossFn | None) -> Tensor | None:
        strategy = self._trainer.strategy
        loss: Tensor | None
        arguments = step_arguments(self._trainer, micro_batch.batch, micro_batch.batch_idx)
        if loss_fn is None:
            loss = closure_loss(strategy.training_step(*arguments))
        else:
            # In place of training_step, so that the strategy sends it through DDP and autocast as it does the step.
            def step(batch: Any, *_: Any) -> Tensor:
                return _checked(loss_fn(self._module, batch))

            with instance_attribute(self._module, "training_step", step):
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


MANUAL = (
    "the module uses manual optimization, where a replay of training_step would step the optimizers again -> give "
    "the plugin loss_fn=lambda module, batch: ..., which returns the loss that this optimizer minimises"
)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or an infinity. A finite sum proves it cheaply; otherwise every entry is looked at.

    Example:
        >>> all_finite([torch.ones(2)]), all_finite([torch.tensor([1.0, float("nan")])])
        (True, False)
    """
    values = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    if not values or math.isfinite(torch.stack([v.sum(dtype=torch.float32) for v in values]).sum().item()):
        return True
    return all(bool(torch.isfinite(v).all()) for v in values)
