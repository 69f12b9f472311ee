"""CrAM inside Lightning: the update rule on core's replay service."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundwire import Finding, GradientStep, Plugin, Problem, RunContext, Section, Variant, hookimpl
from groundwire_cram.method import SHARED, Method, at_least_zero
from groundwire_cram.operators import Operator
from groundwire_cram.report import section
from groundwire_cram.selection import Skip
from groundwire_cram.variants import Calibrated, described, host_copy, variants


class CrAM(Plugin):
    """Train a model that can be compressed in one shot, in several ways, without retraining.

    CrAM+ (Peste et al., 2022): the optimizer gets the gradient of the model plus that of the compressed model at
    weights moved by ``rho`` times the gradient. Each step draws one of ``sparsities``. Optimizer, schedulers,
    clipping and accumulation stay the user's; a step costs two forward and backward passes.

    Args:
        sparsities: Fractions of weights to prune, each in [0, 1); (0.5, 0.7, 0.9) when left out.
        rho: Length of the move, in units of the gradient, at least 0.
        pattern: What is pruned: "global" takes one threshold over all weights, "layerwise" one for each; "2:4",
            "4:8" or any N:M keeps N of M consecutive input channels, "n:m mix" draws 2:4 or 4:8 for each step.
        plus: Add the gradient of the model itself (CrAM+). Without it, plain CrAM.
        sparse_grad: Let pruned entries get no gradient from the compressed model.
        interval: Take the mask of a sparsity anew only at each interval-th step that draws it.
        skip: Layers to leave dense: patterns of parameter or module names such as "head" or "*.downsample.*", or a
            predicate of name and tensor.
        grad_norm: Divide the move by the norm of the whole gradient, as SAM does.
        compress: One or several compression operators (:class:`~groundwire_cram.Operator`) to draw from, in place of
            ``sparsities`` and ``pattern``, such as ``Quantize(8)`` or ``Chain([Magnitude(0.9), Quantize(8)])``.
        compat: "reference" takes the threshold of each of the optimizer's parameter groups by itself, as the published
            code does; otherwise all are pruned together.
        strict: Refuse an N:M pattern that does not divide a layer, instead of leaving that layer dense with a warning.
        backend: Which kernels move, mask and combine: "auto", "aten", "numba", "triton" or "reference".
        seed: Seed of the draws, which are a function of it, the global seed and the global step.
        evaluate_every: Evaluate the compressed versions at the validations of every n-th epoch, and in
            ``trainer.validate`` (one pass each); 0 for never.
        calibration: Batches for the BatchNorm statistics of these versions; by default the last training batches.
        calibration_batches: How many batches to use for that.
        loss_fn: ``loss_fn(module, batch) -> loss``, needed under manual optimization only.

    Raises:
        ValueError: A sparsity is outside [0, 1), none is given, or another argument is out of its range.

    Example:
        >>> CrAM(sparsities=(0.5, 0.9), rho=0.05).sparsities
        (0.5, 0.9)
    """

    name = "cram"
    #: A step whose gradient is not finite changes nothing.
    skips_nonfinite = True

    def __init__(
        self,
        sparsities: float | Sequence[float] | None = None,
        rho: float = 0.05,
        *,
        pattern: str = "global",
        plus: bool = True,
        sparse_grad: bool = True,
        interval: int = 1,
        skip: Skip = (),
        grad_norm: bool = False,
        compress: Operator | Sequence[Operator] | None = None,
        compat: Literal["reference"] | None = None,
        strict: bool = False,
        backend: str = "auto",
        seed: int = 0,
        evaluate_every: int = 0,
        calibration: Any = None,
        calibration_batches: int = 20,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.method = Method(
            sparsities,
            rho,
            pattern=pattern,
            plus=plus,
            sparse_grad=sparse_grad,
            interval=interval,
            skip=skip,
            grad_norm=grad_norm,
            compress=compress,
            compat=compat,
            strict=strict,
            backend=backend,
            seed=seed,
        )
        if at_least_zero("evaluate_every", evaluate_every) % 1:
            raise ValueError(f"evaluate_every must be a whole number of epochs, got {evaluate_every!r}")
        if hasattr(calibration, "__next__"):
            raise ValueError("calibration can be read only once -> give a loader or a list of batches")
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {calibration_batches}")
        self.evaluate_every = evaluate_every
        self.calibration = calibration
        self.calibration_batches = calibration_batches
        self.loss_fn = loss_fn
        self._recent: deque[Any] = deque(maxlen=calibration_batches)
        self._calibrated = Calibrated()

    def __getattr__(self, name: str) -> Any:
        """The arguments that the optimizer has too are kept in ``method``."""
        if name in SHARED and "method" in self.__dict__:
            return getattr(self.method, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """Something must be prunable, and as asked."""
        if not run.ready or run.trainer.state.fn != "fit":
            return []
        try:
            self.method.check(dict(run.module.named_parameters()))
        except ValueError as error:
            message, _, hint = str(error).partition(" -> ")
            return [Problem(self.name, message, hint)]
        return []

    @hookimpl
    def gw_gradient(self, step: GradientStep, run: RunContext) -> Mapping[str, Tensor] | None:
        """One step of CrAM (gradient.py), with what is drawn for it."""
        if self.method.neutral:
            return None
        saved: dict[str, Tensor] = {}
        with step.perturbed(saved=saved) as weights:
            second_pass = partial(step.replay, self.loss_fn)
            return self.method.gradient(weights, step.grads, second_pass, step.optimizer, run.step_seed, saved)

    def state_dict(self) -> dict[str, Any]:
        """The masks that outlive a step, with ``interval`` > 1; no tensor."""
        return self.method.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the masks of the checkpoint."""
        self.method.load_state_dict(state_dict)

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

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give back the memory of the saved weights."""
        self.method.release()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take neither training data along nor the module, whose ``log`` Lightning puts here."""
        kept = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**kept, "_recent": deque(maxlen=self.calibration_batches), "_calibrated": Calibrated()}

    @hookimpl
    def gw_variants(self, module: nn.Module, run: RunContext) -> list[Variant]:
        """The model compressed in each way, with BatchNorm recalibrated."""
        data = list(self._recent) if self.calibration is None else self.calibration
        return variants(module, self.method, data, self.calibration_batches, self._calibrated)

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """The backend, and what each compressed version reaches in what the validation step logs, when it is due."""
        fitting = run.trainer.state.fn == "fit"
        if run.stage == "train":
            return self.method.findings()
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
    def gw_section(self, findings: list[Finding]) -> Section | None:
        """Settings, and what the pruned versions reached."""
        return section(self, findings)

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """The settings that tell how compressible the weights are."""
        return self.method.provenance()


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules())
