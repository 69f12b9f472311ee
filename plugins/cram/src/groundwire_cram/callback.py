"""CrAM inside Lightning: the update rule on core's replay service."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from groundwire import Finding, GradientStep, Plugin, Problem, RunContext, Section, Variant, hookimpl
from groundwire.seeds import derive_seed
from groundwire_cram.functional import (
    check_sparsity,
    combine,
    compress,
    perturb,
    prunable,
    published_masks,
    refuse_weight_norm,
)
from groundwire_cram.report import section
from groundwire_cram.variants import described, host_copy, variant


class CrAM(Plugin):
    """Train a model that can be pruned in one shot, at several sparsities, without retraining.

    CrAM+ (Peste et al., 2022): the optimizer gets the gradient of the model plus that of the compressed model at
    weights moved by ``rho`` times the gradient. Each step draws one of ``sparsities``. Optimizer, schedulers,
    clipping and accumulation stay the user's; a step costs two forward and backward passes.

    Args:
        sparsities: Fractions of weights to prune, each in [0, 1).
        rho: Length of the move, in units of the (not normalised) gradient; at least 0.
        plus: Add the gradient of the model itself (CrAM+). Without it, plain CrAM.
        sparse_grad: Let pruned entries get no gradient from the compressed model.
        seed: Seed of the sparsity draws, which are a function of it, the global seed and the global step.
        evaluate_every: Evaluate the pruned versions at the validations of every n-th epoch, and in ``trainer.validate``
            (one pass each); 0 for never.
        calibration: Batches for the BatchNorm statistics of pruned versions; by default the last training batches.
        calibration_batches: How many batches to use for that.
        loss_fn: ``loss_fn(module, batch) -> loss``, needed under manual optimization only.

    Raises:
        ValueError: A sparsity is outside [0, 1), none is given, or another argument is out of its range.

    Example:
        >>> CrAM(sparsities=(0.5, 0.9), rho=0.05).sparsities
        (0.5, 0.9)
    """

    name = "cram"

    def __init__(
        self,
        sparsities: Sequence[float] = (0.5, 0.7, 0.9),
        rho: float = 0.05,
        *,
        plus: bool = True,
        sparse_grad: bool = True,
        seed: int = 0,
        evaluate_every: int = 0,
        calibration: Any = None,
        calibration_batches: int = 20,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.sparsities = tuple(
            check_sparsity(s) for s in ([sparsities] if isinstance(sparsities, Real) else sparsities)
        )
        if not self.sparsities:
            raise ValueError("sparsities is empty -> give at least one fraction, such as 0.9")
        self.rho = _at_least_zero("rho", rho)
        if _at_least_zero("evaluate_every", evaluate_every) % 1:
            raise ValueError(f"evaluate_every must be a whole number of epochs, got {evaluate_every!r}")
        if hasattr(calibration, "__next__"):
            raise ValueError("calibration can be read only once -> give a loader or a list of batches")
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {calibration_batches}")
        self.plus = plus
        self.sparse_grad = sparse_grad
        self.seed = seed
        self.evaluate_every = evaluate_every
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self.loss_fn = loss_fn
        self._recent: deque[Any] = deque(maxlen=calibration_batches)

    @property
    def neutral(self) -> bool:
        """Whether these arguments ask for ordinary training."""
        return not self.plus and self.rho == 0 and all(s == 0 for s in self.sparsities)

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """Something must be prunable."""
        if not run.ready or run.trainer.state.fn != "fit":
            return []
        try:
            refuse_weight_norm(name for name, _ in run.module.named_parameters())
        except ValueError as error:
            return [Problem(self.name, *str(error).split(" -> "))]
        if not prunable(dict(run.module.named_parameters())):
            return [Problem(self.name, f"{type(run.module).__name__} has no weight of more than one dimension")]
        return []

    @hookimpl
    def gw_gradient(self, step: GradientStep, run: RunContext) -> Mapping[str, Tensor] | None:
        """One step of CrAM (functional.py), at a sparsity drawn for this step."""
        if self.neutral:
            return None
        sparsity = self._draw(run)
        with step.perturbed() as weights:
            perturb(weights, step.grads, self.rho)
            masks = published_masks({name: weights[name] for name in prunable(weights)}, sparsity)
            compress(weights, masks)
            second = step.replay(self.loss_fn)
        return combine(step.grads, second, masks, plus=self.plus, sparse_grad=self.sparse_grad)

    def _draw(self, run: RunContext) -> float:
        return self.sparsities[derive_seed(self.seed, run.step_seed) % len(self.sparsities)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep an epoch's last batches for recalibration, and its first ones until then.

        Only those, because a copy to the host waits for the device. They outlive the fit, for a test after it.
        """
        wanted = len(self._recent) < self.calibration_batches
        wanted = wanted or batch_idx >= trainer.num_training_batches - self.calibration_batches
        if self.calibration is None and wanted and _has_batchnorm(pl_module):
            self._recent.append(host_copy(batch))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Other training, other batches."""
        self._recent.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take no training data along."""
        return {**vars(self), "_recent": deque(maxlen=self.calibration_batches)}

    @hookimpl
    def gw_variants(self, module: nn.Module, run: RunContext) -> list[Variant]:
        """The model pruned to each sparsity, with BatchNorm recalibrated."""
        data = list(self._recent) if self.calibration is None else self.calibration
        return [variant(module, s, data, self.calibration_batches) for s in self.sparsities if s > 0]

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Accuracy (or whatever the validation step logs) of each pruned version, when it is due."""
        fitting = run.trainer.state.fn == "fit"
        due = not fitting or not (run.trainer.current_epoch + 1) % (self.evaluate_every or 1)
        if run.stage != "validate" or not self.evaluate_every or not due:
            return []
        found = []
        for version in [None, *run.variants()]:
            evaluation = run.evaluate(version)
            label = "dense" if version is None else version.name
            for metric, value in evaluation.metrics.items():
                message = f"{metric} of the {described(label)}."
                found.append(Finding(self.name, f"{metric}@{label}", "info", value, message))
        return found

    @hookimpl
    def gw_section(self, findings: list[Finding]) -> Section | None:
        """Settings, and what the pruned versions reached."""
        return section(self, findings)

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """The settings that tell how compressible the weights are."""
        return {"sparsities": list(self.sparsities), "rho": self.rho, "plus": self.plus}


def _at_least_zero(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, Real) else -1.0
    if not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return number


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules())
