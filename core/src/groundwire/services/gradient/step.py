"""The moment before an optimizer step, at which plugins finish, replace and edit the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire._lightning import Trainer, gradient_scaler, takes_dataloader_iter, zeroing_objects
from groundwire.errors import PluginError, Problem
from groundwire.finite import all_finite
from groundwire.hooks.markers import hookimpl
from groundwire.records import Finding, GradientStep
from groundwire.run import BatchStart, Run
from groundwire.service import Service
from groundwire.services.gradient.replay import MANUAL, ReplayableStep, loss_function_problem
from groundwire.services.gradient.window import AccumulationWindow, Recorded

_SHARDING = ("DeepSpeed", "FSDP", "ModelParallel")
_NONFINITE = {
    "gradients": "the gradient was not finite, so it was left as it is",
    "steps": "the gradient was not finite, so the optimizer got none and changed nothing",
    "replays": "the replay's gradient was not finite, so the first one was used",
}


class GradientService(Service):
    """Calls ``gw_backward_done``, ``gw_gradient`` and ``gw_gradient_edit`` once a step."""

    name = "groundwire-gradient"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._window = AccumulationWindow()
        self._owners: list[str] = []
        self._editors: list[str] = []
        self._finishers: list[str] = []
        self._names: dict[int, tuple[tuple[int, ...], dict[str, nn.Parameter]]] = {}
        self._backwards = self._steps = 0
        self._stepping = False
        self.nonfinite = dict.fromkeys(_NONFINITE, 0)

    @hookimpl(tryfirst=True)
    def gw_check(self) -> list[Problem]:
        """Refuse two owners, and what cannot be replayed. Optimizers join late, so owners are looked up each time."""
        hooks = self.run.hooks
        self._owners, self._editors = hooks.owners("gw_gradient"), hooks.owners("gw_gradient_edit")
        self._finishers = hooks.owners("gw_backward_done")
        if len(self._owners) > 1:
            names = " and ".join(repr(name) for name in sorted(self._owners))
            return [Problem("groundwire", f"{names} both own the gradient (gw_gradient)", "keep one of them")]
        training = self.run.function == "fit" and self.run.ready
        if not self._owners:
            return []
        problems = self._unreplayable(self._owners[0]) if training else []
        wrong = loss_function_problem(self._loss_fn) if self.run.function == "fit" else None
        return [*problems, Problem(self._owners[0], *wrong)] if wrong else problems

    def _unreplayable(self, owner: str) -> list[Problem]:
        module, problems = self.run.module, []
        strategy = type(self.run.trainer.strategy).__name__
        if any(word in strategy for word in _SHARDING):
            text = f"{strategy} shards gradients, which cannot be replayed"
            problems.append(Problem(owner, text, "use strategy='ddp'"))
        if takes_dataloader_iter(module):
            text = "training_step takes dataloader_iter, which cannot be read twice"
            problems.append(Problem(owner, text, "take batch"))
        if not module.automatic_optimization and self._loss_fn is None:
            problems.append(Problem(owner, *MANUAL.split(" -> ")))
        return problems

    @property
    def _loss_fn(self) -> Any:
        return getattr(self.run.implementers[self._owners[0]], "loss_fn", None) if self._owners else None

    def start(self) -> None:
        """Record batches from now on, if somebody may replay them."""
        run = self.run
        if not self._owners or run.function != "fit":
            return
        self._window.begin(run.trainer.optimizers)
        run.before_batch["train"].append(self._record)
        run.before_forward["train"].append(lambda start: self._window.note_results(run.first_results))
        run.undo.callback(self._window.close)
        if not run.module.automatic_optimization:
            for optimizer, zeroing in zeroing_objects(run.trainer):
                run.undo.enter_context(self._window.watching(optimizer, zeroing))

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        """Return the hooks around a backward and before a step, as far as somebody takes part in the gradient."""
        found: dict[str, Callable[..., Any]] = {}
        if self._owners:
            found |= {"on_before_zero_grad": self._before_zero_grad, "on_before_backward": self._before_backward}
        if self._owners or self._editors or self._finishers:
            found["on_before_optimizer_step"] = self._before_optimizer_step
        return found

    def _record(self, start: BatchStart) -> None:
        self._window.record(start.batch, start.batch_idx, self.run.module, self.run.trainer)

    def _before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        self._window.doubt(optimizer)

    def _before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Take the pending batch into the window, unless this is the backward of a replay."""
        if not self._stepping:
            self._window.commit()
            self._backwards += 1

    def _before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Let plugins change the gradient, which is complete."""
        if self._finishers:
            self.run.hooks.call("gw_backward_done", phase="window")
        if not (self._editors or self._owners):
            return
        self._steps += 1
        window = self._window.of(optimizer, once=not self.run.module.automatic_optimization)
        self._stepping = True
        try:
            with _unscaled(trainer, optimizer), self.run.extra_pass():
                self._change(optimizer, window)
        finally:
            self._stepping = False
            self._window.use(optimizer)

    def _change(self, optimizer: Optimizer, window: Sequence[Recorded]) -> None:
        step = ReplayableStep(
            self.run, optimizer, self._parameters(optimizer), window, self._replay_done, self._loss_fn
        )
        if not step.grads:
            return
        if window:
            step.grads.update(self._owned(step))
        if self._editors:
            self.run.hooks.call("gw_gradient_edit", step=step)
        _write(step)

    def _owned(self, step: GradientStep) -> Mapping[str, Tensor]:
        """Return the owner's gradient; nothing where the first pass or its own was not finite."""
        if not all_finite(step.grads.values()):
            return self._nonfinite(step)
        found = self.run.hooks.call("gw_gradient", step=step)
        if found is None:
            return {}
        if not step.finite:
            self.nonfinite["replays"] += 1
            return {}
        _refuse_wrong(self._owners[0], step, found)
        return dict(found)

    def _nonfinite(self, step: GradientStep) -> Mapping[str, Tensor]:
        """Leave it as it is; or, if the owner asks for it and no scaler skips the step, give the step no gradient."""
        skips = getattr(self.run.implementers[self._owners[0]], "skips_nonfinite", False)
        if not skips or gradient_scaler(self.run.trainer) is not None:
            self.nonfinite["gradients"] += 1
            return {}
        self.nonfinite["steps"] += 1
        for parameter in step.parameters.values():
            parameter.grad = None
        step.grads.clear()
        return {}

    def _replay_done(self) -> None:
        if self._finishers:
            self.run.hooks.call("gw_backward_done", phase="replay")

    def _parameters(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the optimizer's parameters by name; looked up again when its groups grow."""
        sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
        known = self._names.get(id(optimizer))
        if known is None or known[0] != sizes:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = {name: p for name, p in self.run.module.named_parameters() if id(p) in ids}
            known = self._names[id(optimizer)] = (sizes, named)
        return known[1]

    @hookimpl
    def gw_findings(self) -> list[Finding]:
        """Report the steps in which a non-finite gradient kept the owner from acting, when training ends."""
        if self.run.stage != "train":
            return []
        if self._backwards and not self._steps:
            warnings.warn(
                f"{self._owners[0]!r} had no effect: the optimizers were stepped in a way that Lightning does not see, "
                "such as optimizers(use_pl_optimizer=False)",
                stacklevel=2,
            )
        return [
            Finding("groundwire", f"nonfinite_{kind}", "warn", count, f"In {count} steps {_NONFINITE[kind]}.", "train")
            for kind, count in self.nonfinite.items()
            if count
        ]


def _refuse_wrong(owner: str, step: GradientStep, found: Any) -> None:
    """Raise for what is no mapping of gradients of this step's parameters."""
    if not isinstance(found, Mapping):
        raise PluginError(f"{owner}: gw_gradient must return a mapping or None, got {type(found).__name__}")
    unknown = sorted(set(found) - set(step.parameters))
    if unknown:
        raise PluginError(f"{owner} returned gradients of unknown parameters: {unknown}")
    for name, grad in found.items():
        wanted = tuple(step.parameters[name].shape)
        if not isinstance(grad, Tensor) or tuple(grad.shape) != wanted:
            shape = f"shape {tuple(grad.shape)}" if isinstance(grad, Tensor) else type(grad).__name__
            raise PluginError(f"{owner}: the gradient of {name!r} must be a tensor of shape {wanted}, got {shape}")


@contextmanager
def _unscaled(trainer: Trainer, optimizer: Optimizer) -> Iterator[None]:
    """Context manager with unscaled gradients: fused optimizers unscale inside ``step``, so Lightning does not."""
    scaler = gradient_scaler(trainer)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        yield
        return
    scale = scaler.get_scale()
    _multiply(optimizer, 1.0 / scale)
    try:
        yield
    finally:
        _multiply(optimizer, scale)


def _multiply(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _write(step: GradientStep) -> None:
    """Hand the final gradient to the optimizer. Views of DDP's buckets are written into, never replaced."""
    for name, grad in step.grads.items():
        parameter = step.parameters[name]
        if parameter.grad is None or not step.views:
            parameter.grad = grad.detach()
        elif parameter.grad is not grad:
            parameter.grad.copy_(grad)
