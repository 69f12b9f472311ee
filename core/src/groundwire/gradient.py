"""When Lightning is about to step, let the run's plugins change the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire._lightning import gradient_scaler, optimizer_faces, takes_dataloader_iter
from groundwire.errors import PluginError
from groundwire.replay import MANUAL, GradientStep, all_finite
from groundwire.types import Finding, Problem
from groundwire.window import Recorded, Window

if TYPE_CHECKING:
    from groundwire.host import Host


class GradientService:
    """Calls ``gw_backward_done``, ``gw_gradient`` and ``gw_gradient_edit`` once a step."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._window = Window()
        self._owners: list[str] = []
        self._editors: list[str] = []
        self._done = False
        self._recording = False
        self._names: dict[int, tuple[tuple[int, ...], dict[str, nn.Parameter]]] = {}
        self._backwards = self._steps = 0
        self.nonfinite = {"gradients": 0, "steps": 0, "replays": 0}

    def refresh(self) -> list[Problem]:
        """Look again who takes part (optimizers join late); problems of two owners and of what cannot be replayed."""
        hooks = self._host.hooks
        self._owners, self._editors = hooks.owners("gw_gradient"), hooks.owners("gw_gradient_edit")
        self._done = bool(hooks.owners("gw_backward_done"))
        if len(self._owners) > 1:
            names = " and ".join(repr(name) for name in sorted(self._owners))
            return [Problem("groundwire", f"{names} both own the gradient (gw_gradient)", "keep one of them")]
        training = self._host.fn == "fit" and self._host.ready
        return self._unreplayable() if self._owners and training else []

    def _unreplayable(self) -> list[Problem]:
        owner, module = self._owners[0], self._host.module
        problems = []
        strategy = type(self._host.trainer.strategy).__name__
        if any(word in strategy for word in ("DeepSpeed", "FSDP", "ModelParallel")):
            problems.append(
                Problem(owner, f"{strategy} shards gradients, which cannot be replayed", "use strategy='ddp'")
            )
        if takes_dataloader_iter(module):
            problems.append(
                Problem(owner, "training_step takes dataloader_iter, which cannot be read twice", "take batch")
            )
        if not module.automatic_optimization and getattr(self._host.by_name[owner], "loss_fn", None) is None:
            problems.append(Problem(owner, *MANUAL.split(" -> ")))
        return problems

    @property
    def idle(self) -> bool:
        """Whether nobody takes part in the gradient of this run."""
        return not (self._owners or self._editors or self._done)

    def attach(self) -> None:
        """Record batches from now on, if somebody may replay them."""
        if self._owners and self._host.fn == "fit":
            self._recording = True
            self._host.stack.callback(self._window.close)
            if not self._host.module.automatic_optimization:
                for optimizer, face in optimizer_faces(self._host.trainer):
                    self._host.stack.enter_context(self._window.watching(optimizer, face))

    def before_step(self, batch: Any, batch_idx: int) -> None:
        """Record the batch, which somebody may replay."""
        if self._recording:
            self._window.record(batch, batch_idx, self._host.module)

    def started(self, first_results: Mapping[str, Any]) -> None:
        """Keep what ``gw_batch_start`` returned for that batch."""
        if self._recording:
            self._window.started(first_results)

    @property
    def recording(self) -> bool:
        """Whether batches are recorded."""
        return self._recording

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        """A new window begins."""
        if self._owners:
            self._window.clear(optimizer)

    def before_backward(self) -> None:
        """The pending batch is part of the window."""
        if self._owners:
            self._window.commit()
            self._backwards += 1

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The gradient is complete: let plugins finish, replace and edit it."""
        if self._done:
            self._host.hooks.call("gw_backward_done", phase="window")
        if not (self._editors or self._owners):
            return
        self._steps += 1
        window = self._window.of(optimizer, once=not self._host.module.automatic_optimization)
        try:
            with _unscaled(self._host.trainer, optimizer), self._host.scores.aside():
                self._change(optimizer, window)
        finally:
            self._window.clear(optimizer)

    def _change(self, optimizer: Optimizer, window: Sequence[Recorded]) -> None:
        step = GradientStep(
            self._host.trainer,
            self._host.module,
            optimizer,
            self._parameters(optimizer),
            window,
            self._host.seed,
            self._replay_start,
            self._replay_done,
            getattr(self._host.by_name[self._owners[0]], "loss_fn", None) if self._owners else None,
        )
        if not step.grads:
            return
        if window:
            step.grads.update(self._owned(step))
        if self._editors:
            self._host.hooks.call("gw_gradient_edit", step=step)
        _write(step)

    def _owned(self, step: GradientStep) -> Mapping[str, Tensor]:
        """The owner's gradient; nothing where the first pass or its own was not finite."""
        if not all_finite(step.grads.values()):
            return self._nonfinite(step)
        found = self._host.hooks.call("gw_gradient", step=step)
        if found is None:
            return {}
        if not step.finite:
            self.nonfinite["replays"] += 1
            return {}
        _refuse_wrong(self._owners[0], step, found)
        return dict(found)

    def _nonfinite(self, step: GradientStep) -> Mapping[str, Tensor]:
        """Leave it as it is; or, if the owner asks for it and no scaler skips the step, give the step no gradient."""
        skips = getattr(self._host.by_name[self._owners[0]], "skips_nonfinite", False)
        if not skips or gradient_scaler(self._host.trainer) is not None:
            self.nonfinite["gradients"] += 1
            return {}
        self.nonfinite["steps"] += 1
        for parameter in step.parameters.values():
            parameter.grad = None
        step.grads.clear()
        return {}

    def _replay_start(self, recorded: Recorded) -> None:
        self._host.batch_start(recorded.micro_batch.batch, "train", None, recorded.first_results)

    def _replay_done(self) -> None:
        if self._done:
            self._host.hooks.call("gw_backward_done", phase="replay")

    def _parameters(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """The optimizer's parameters by name; looked up again when its groups grow."""
        sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
        known = self._names.get(id(optimizer))
        if known is None or known[0] != sizes:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = {name: p for name, p in self._host.module.named_parameters() if id(p) in ids}
            known = self._names[id(optimizer)] = (sizes, named)
        return known[1]

    def findings(self) -> list[Finding]:
        """Steps in which a non-finite gradient kept the owner from acting."""
        where = {
            "gradients": "the gradient was not finite, so it was left as it is",
            "steps": "the gradient was not finite, so the optimizer got none and changed nothing",
            "replays": "the replay's gradient was not finite, so the first one was used",
        }
        if self._backwards and not self._steps:
            warnings.warn(
                f"{self._owners[0]!r} had no effect: the optimizers were stepped in a way that Lightning does not see, "
                "such as optimizers(use_pl_optimizer=False)",
                stacklevel=2,
            )
        return [
            Finding("groundwire", f"nonfinite_{kind}", "warn", count, f"In {count} steps {where[kind]}.", "train")
            for kind, count in self.nonfinite.items()
            if count
        ]


def _refuse_wrong(owner: str, step: GradientStep, found: Any) -> None:
    """What the owner returned must be gradients of this step's parameters."""
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
def _unscaled(trainer: Any, optimizer: Optimizer) -> Iterator[None]:
    """Fused optimizers unscale inside ``step``, so Lightning leaves their gradients scaled: unscale and scale again."""
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
