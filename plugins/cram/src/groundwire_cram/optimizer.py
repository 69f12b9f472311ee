"""CrAM around any torch optimizer, in a plain training loop or in a Lightning Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire import Finding, GradientStep, RunContext, hookimpl
from groundwire.finite import all_finite
from groundwire.optimizers import in_a_run, require_run
from groundwire.undo.without_trace import without_trace
from groundwire_cram.minimizer import Minimizer
from groundwire_cram.settings import Settings, with_settings

Closure = Callable[[], Any]


class _OfBase:
    """An attribute that somebody sets on the optimizer for its step, and that has to reach the base optimizer."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Delegating, owner: type) -> Any:
        return getattr(instance.base_optimizer, self.name)

    def __set__(self, instance: Delegating, value: Any) -> None:
        setattr(instance.base_optimizer, self.name, value)

    def __delete__(self, instance: Delegating) -> None:
        delattr(instance.base_optimizer, self.name)


@dataclass(eq=False, repr=False)
class Delegating(Optimizer):
    """An optimizer whose state, groups and defaults are those of another one, live.

    Args:
        base_optimizer: The optimizer to step, an instance.
    """

    base_optimizer: Optimizer

    #: Set by a gradient scaler on fused optimizers, which unscale inside their step.
    grad_scale, found_inf = _OfBase(), _OfBase()

    def __post_init__(self) -> None:
        base = self.__dict__.pop("base_optimizer")
        if not isinstance(base, Optimizer):
            raise TypeError(
                f"base_optimizer must be an optimizer, got {base!r} -> "
                "CrAMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))"
            )
        # torch sets up what every optimizer has, then gives way to the base's groups, state and defaults.
        super().__init__([torch.empty(0)], {})
        for name in ("param_groups", "state", "defaults"):
            del self.__dict__[name]
        self.base_optimizer = base

    def __getattr__(self, name: str) -> Any:
        """Return the base optimizer's attribute for what is not its own."""
        if name.startswith("__") or "base_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Return all of it: torch's own keeps only groups, state and defaults."""
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # a scheduler's wrapper

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.add_param_group(param_group)
        else:  # torch's __init__, before there is a base
            super().add_param_group(param_group)


@with_settings
@dataclass(eq=False, repr=False)
class CrAMOptimizer(Settings, Delegating):
    """CrAM for a plain PyTorch loop: gives ``base_optimizer`` the compression-aware gradient, and lets it step.

    It has no state and no parameter groups of its own: both are the base optimizer's, live, so schedulers, checkpoints
    and gradient scalers deal with the one optimizer that there is. A checkpoint of either loads into the other.
    One step is::

        loss = criterion(model(x), y)
        loss.backward()                       # the gradient at the weights, as always
        optimizer.step(lambda: criterion(model(x), y).backward())
        optimizer.zero_grad()

    In a Lightning Trainer, return it from ``configure_optimizers`` and add ``groundwire.Plugins()`` to the callbacks:
    the module's own step is then replayed, under accumulation, mixed precision and DDP, and no closure is needed.

    Args:
        base_optimizer: The optimizer to step, an instance. Names for ``skip`` are known if ``module`` is given or it
            was made from ``named_parameters()``; otherwise they are "group.index".
        first_pass: "present" expects the gradient at the weights to be there when ``step`` is called, as the
            published optimizer does; "closure" calls the closure once more to compute it.
        module: The model. Its buffers (BatchNorm statistics), metrics and random states are put back after the second
            pass; without it they are as that pass leaves them.
        loss_fn: ``loss_fn(module, batch) -> loss``, or with ``optimizer`` as third argument; in a Trainer under manual
            optimization only.

    Raises:
        TypeError: ``base_optimizer`` is not an instance of a torch optimizer.
        ValueError: Another argument is out of its range, or nothing can be pruned.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = CrAMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsities=0.5, module=model)
        >>> def closure():
        ...     loss = model(torch.ones(1, 4)).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = closure()
        >>> loss = optimizer.step(closure)
    """

    #: A step whose gradient is not finite changes nothing.
    skips_nonfinite = True
    name = "cram"

    _: KW_ONLY
    first_pass: Literal["present", "closure"] = "present"
    module: nn.Module | None = None
    loss_fn: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.first_pass not in ("present", "closure"):
            raise ValueError(f'first_pass must be "present" or "closure", got {self.first_pass!r}')
        Delegating.__post_init__(self)
        Settings.__post_init__(self)
        self.minimizer = Minimizer(self)
        self.steps = self.skipped_steps = 0
        self.minimizer.check(self.module or self._named())
        require_run(self)

    def __repr__(self) -> str:
        return f"CrAMOptimizer({', '.join(map(str, self.operators))}; {self.base_optimizer!r})"

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's, with the number of steps and no tensor more under "cram"."""
        mine = {"steps": self.steps, "skipped_steps": self.skipped_steps, **self.minimizer.state_dict()}
        return {**self.base_optimizer.state_dict(), "cram": mine}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, or a checkpoint of the base optimizer."""
        mine = state_dict.get("cram", {})
        self.base_optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "cram"})
        self.steps, self.skipped_steps = mine.get("steps", 0), mine.get("skipped_steps", 0)
        self.minimizer.load_state_dict(mine)

    def step(self, closure: Closure | None = None) -> Any:
        """Make one step of CrAM.

        Args:
            closure: Computes the loss and its gradient (``backward``) at the weights as they are; called at the
                compressed weights, and with ``first_pass="closure"`` before that at the weights themselves.

        Returns:
            What the closure returned: with ``first_pass="closure"`` from its first call.

        Raises:
            TypeError: There is no closure.
            RuntimeError: ``first_pass="present"`` and no parameter has a gradient.
        """
        if self in in_a_run:  # the run has put the gradient in place
            return self.base_optimizer.step(closure)
        if closure is None:
            raise TypeError(
                "CrAM computes a second gradient -> optimizer.step(closure), where closure() computes the loss and "
                "calls backward()"
            )
        loss = self._first_pass(closure)
        first = {name: p.grad for name, p in self._named().items() if p.grad is not None}
        if not first:
            raise RuntimeError('no parameter has a gradient -> call backward() first, or use first_pass="closure"')
        if not all_finite(first.values()):
            return self._skip(loss)
        if not self.minimizer.neutral:
            second_loss = self._second_pass(first, closure)
            loss = second_loss if self.first_pass == "present" else loss
        self.steps += 1
        self.base_optimizer.step()
        return loss

    def _first_pass(self, closure: Closure) -> Any:
        if self.first_pass == "present":
            return None
        self.zero_grad()
        with torch.enable_grad():
            return closure()

    def _second_pass(self, first: Mapping[str, Tensor], closure: Closure) -> Any:
        """Replace the gradients by CrAM's; returns the loss of the compressed model."""
        weights = self._named()
        losses: list[Any] = []

        def gradient() -> dict[str, Tensor]:
            for p in weights.values():
                p.grad = None
            with self._module_unseen(), torch.enable_grad():
                losses.append(closure())
            return {name: p.grad for name, p in weights.items() if p.grad is not None}

        found: Mapping[str, Tensor] | None = None
        try:
            with self._restored(weights) as saved:
                found = self.minimizer.gradient(weights, first, gradient, self, self.steps, saved, self.module)
        finally:
            good = found is not None and all_finite(found.values())
            self.minimizer.overflows += found is not None and not good
            for name, p in weights.items():
                p.grad = found[name] if found is not None and good and name in found else first.get(name)
        return losses[-1] if losses else None

    @contextmanager
    def _restored(self, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield a dict for copies of weights; what it still holds at the end is restored."""
        saved: dict[str, Tensor] = {}
        with torch.no_grad():
            try:
                yield saved
            finally:
                for name, copy in saved.items():
                    weights[name].copy_(copy)

    def _module_unseen(self) -> AbstractContextManager[None]:
        return nullcontext() if self.module is None else without_trace(self.module)

    def _skip(self, loss: Any) -> Any:
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            warnings.warn(
                "the gradient is not finite: this step is skipped, and so are further ones, counted in skipped_steps",
                stacklevel=3,
            )
        return loss

    def _named(self) -> dict[str, Tensor]:
        """Return the parameters by their name in the module or the optimizer, else by group and index."""
        known = {} if self.module is None else {id(p): name for name, p in self.module.named_parameters()}
        named = {}
        for number, group in enumerate(self.base_optimizer.param_groups):
            names = group.get("param_names", [f"{number}.{index}" for index in range(len(group["params"]))])
            named.update({known.get(id(p), name): p for name, p in zip(names, group["params"], strict=True)})
        return named

    @hookimpl
    def gw_gradient(self, step: GradientStep, run: RunContext) -> Mapping[str, Tensor] | None:
        """Return CrAM's gradient for a step of a Trainer; other optimizers of the module are left alone."""
        if self.minimizer.neutral or step.optimizer is not self:
            return None
        saved: dict[str, Tensor] = {}
        with step.perturbed(saved=saved) as weights:
            return self.minimizer.gradient(
                weights, step.grads, lambda: step.replay(self.loss_fn), self, run.step_seed, saved, run.module
            )

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Return which kernels were used, and steps in which a moved weight was not finite."""
        return self.minimizer.findings() if run.stage == "train" else []

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """Return the settings that tell how compressible the weights are."""
        return self.minimizer.provenance()
