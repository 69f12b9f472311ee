"""CrAM inside Lightning: the update rule on core's replay service."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groundwire import Finding, GradientStep, Plugin, Problem, RunContext, Section, Variant, hookimpl
from groundwire_cram.minimizer import Minimizer
from groundwire_cram.prunable import Prunability, describe
from groundwire_cram.report import section
from groundwire_cram.settings import Settings, at_least_zero, with_settings
from groundwire_cram.variants import Calibrated, described, host_copy, variants


@with_settings
@dataclass(eq=False, repr=False)
class CrAM(Settings, Plugin):
    """Train a model that can be compressed in one shot, in several ways, without retraining.

    CrAM+ (Peste et al., 2022): the optimizer gets the gradient of the model plus that of the compressed model at
    weights moved by ``rho`` times the gradient. Each step draws one of ``sparsities``. Optimizer, schedulers,
    clipping and accumulation stay the user's; a step costs two forward and backward passes.

    Args:
        evaluate_every: Evaluate the compressed versions at the validations of every n-th epoch, and in
            ``trainer.validate`` (one pass each); 0 for never.
        calibration: Batches for the BatchNorm statistics of these versions; by default the last training batches.
        calibration_batches: How many batches to use for that.
        loss_fn: ``loss_fn(module, batch) -> loss``, or with ``optimizer`` as third argument, needed under manual
            optimization only.

    Raises:
        ValueError: A sparsity is outside [0, 1), none is given, or another argument is out of its range.

    Example:
        >>> CrAM(sparsities=(0.5, 0.9), rho=0.05).sparsities
        (0.5, 0.9)
    """

    name = "cram"
    #: A step whose gradient is not finite changes nothing.
    skips_nonfinite = True

    _: KW_ONLY
    evaluate_every: int = 0
    calibration: Any = None
    calibration_batches: int = 20
    loss_fn: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if at_least_zero("evaluate_every", self.evaluate_every) % 1:
            raise ValueError(f"evaluate_every must be a whole number of epochs, got {self.evaluate_every!r}")
        if hasattr(self.calibration, "__next__"):
            raise ValueError("calibration can be read only once -> give a loader or a list of batches")
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {self.calibration_batches}")
        self.minimizer = Minimizer(self)
        self._recent: deque[Any] = deque(maxlen=self.calibration_batches)
        self._calibrated = Calibrated()

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """Return what cannot be pruned as asked."""
        if not run.ready or run.trainer.state.fn != "fit":
            return []
        try:
            self.minimizer.check(run.module)
        except ValueError as error:
            message, _, hint = str(error).partition(" -> ")
            return [Problem(self.name, message, hint)]
        return []

    @hookimpl
    def gw_gradient(self, step: GradientStep, run: RunContext) -> Mapping[str, Tensor] | None:
        """Return the gradient of CrAM (gradient.py) with what is drawn for this step."""
        if self.minimizer.neutral:
            return None
        saved: dict[str, Tensor] = {}
        with step.perturbed(saved=saved) as weights:
            second_pass = partial(step.replay, self.loss_fn)
            return self.minimizer.gradient(
                weights, step.grads, second_pass, step.optimizer, run.step_seed, saved, run.module
            )

    def describe(self, module: nn.Module) -> list[Prunability]:
        """Say of each parameter of ``module`` whether it is compressed, and why or why not.

        Example:
            >>> CrAM(skip="1").describe(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False)))
            [Prunability(name='0.weight', shape=(2, 4), pruned=True, reason='weight of Linear'),
             Prunability(name='1.weight', shape=(2, 2), pruned=False, reason='named by skip')]
        """
        return describe(module, self.skip, self.compat)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks that outlive a step, with ``interval`` > 1; no tensor."""
        return self.minimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the masks of the checkpoint."""
        self.minimizer.load_state_dict(state_dict)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep an epoch's last batches for recalibration, and its first ones until then.

        Only those, because a copy to the host waits for the device. They outlive the fit, for a test after it.
        """
        wanted = len(self._recent) < self.calibration_batches
        wanted = wanted or batch_idx >= trainer.num_training_batches - self.calibration_batches
        if self.calibration is None and wanted and _has_batchnorm(pl_module):
            self._recent.append(host_copy(batch))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the batches of another training."""
        self._recent.clear()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give back the memory of the saved weights."""
        self.minimizer.release()

    def __getstate__(self) -> dict[str, Any]:
        """Take neither training data along nor the module, whose ``log`` Lightning puts here."""
        kept = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**kept, "_recent": deque(maxlen=self.calibration_batches), "_calibrated": Calibrated()}

    @hookimpl
    def gw_variants(self, module: nn.Module, run: RunContext) -> list[Variant]:
        """Return the model compressed in each way, with BatchNorm recalibrated."""
        data = list(self._recent) if self.calibration is None else self.calibration
        return variants(module, self.minimizer, data, self.calibration_batches, self._calibrated, self.loss_fn)

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Return the backend, and what the validation step logs of each compressed version, when it is due."""
        fitting = run.trainer.state.fn == "fit"
        if run.stage == "train":
            return self.minimizer.findings()
        due = not fitting or not (run.trainer.current_epoch + 1) % (self.evaluate_every or 1)
        if run.stage != "validate" or not self.evaluate_every or not due:
            return []
        found = []
        for version in [None, *self.gw_variants(run.module, run)]:
            evaluation = run.evaluate(version)
            label = "dense" if version is None else version.name
            for metric, value in evaluation.metrics.items():
                message = f"{metric} of the {described(label)}."
                found.append(Finding(self.name, f"{metric}@{label}", "info", value, message))
        return found

    @hookimpl
    def gw_section(self, findings: list[Finding], run: RunContext) -> Section | None:
        """Return settings, what stays dense, and what the pruned versions reached."""
        return section(self, findings, self.describe(run.module), self.name)

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """Return the settings that tell how compressible the weights are."""
        return self.minimizer.provenance()


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules())
