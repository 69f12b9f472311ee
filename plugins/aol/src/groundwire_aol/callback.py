"""AOL inside Lightning: conversion, caching, certified accuracy, export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundwire import Fields, Finding, Plugin, PluginError, Problem, RunContext, Section, hookimpl
from groundwire.modules import outputs_of
from groundwire_aol.certify.certificates import RADII, check_radii, smallest_std
from groundwire_aol.certify.score_module import has_weights
from groundwire_aol.convert.conversion import lipschitz
from groundwire_aol.errors import UnknownLipschitzError, UnsoundError
from groundwire_aol.evaluation import CertifiedPass, Result, classes_of, warn_of_range
from groundwire_aol.layers.parametrization import AOLParametrization, bake, parametrizations
from groundwire_aol.report import section

_LOG = logging.getLogger("lightning.pytorch.groundwire_aol")


class AOL(Plugin):
    """Turn the model into a 1-Lipschitz one and report how far its predictions are certain.

    Almost-orthogonal layers (Prach and Lampert, 2022). The model is converted as by ``groundwire_aol.lipschitz`` before
    weights are restored and optimizers made. Each validation and test epoch logs the clean accuracy ``aol/clean`` and
    the certified ones ``aol/certified@<eps>``, with a Lipschitz bound that is proved anew for these weights. Train
    with ``OffsetCrossEntropy`` and images in [0, 1].

    Args:
        activation: What replaces ReLU and its like: "maxmin", "nactivation", or None to keep them.
        steps: Of the rescale: 1, or 2 for the tighter rule at about four times its cost.
        eps: Radii in L2 at which accuracy is certified, in units of pixels in [0, 1].
        input_std: Deviations that the data is divided by outside the model. Radii then count ``1 / min(input_std)``.
        exclude: Paths of submodules to leave as they are; certificates count their norms.
        log: Whether to certify, log and report; otherwise the model is only converted.
        init: "orthogonal" for training from scratch; "keep" keeps present weights as raw weights.
        rounding: Whether radii cover the rounding of the scores, by a proved bound; ``aol/rounding`` is the largest
            part of a radius that this took. Otherwise certificates are of exact arithmetic, as in the literature.
        last_layer: "normalized" gives the layer that computes the scores rows of length 1 instead of an AOL weight;
            certificates are then per pair of classes.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> AOL(eps=(36 / 255, 1.0)).steps
        1
    """

    name = "aol"

    def __init__(
        self,
        activation: Literal["maxmin", "nactivation"] | None = "maxmin",
        steps: int = 1,
        eps: Sequence[float] = RADII,
        input_std: float | Sequence[float] | None = None,
        exclude: Sequence[str] = (),
        log: bool = True,
        *,
        init: Literal["orthogonal", "keep"] = "orthogonal",
        rounding: bool = True,
        last_layer: Literal["aol", "normalized"] = "aol",
    ) -> None:
        if activation not in ("maxmin", "nactivation", None):
            raise ValueError(f"activation must be 'maxmin', 'nactivation' or None, got {activation!r}")
        if steps not in (1, 2):
            raise ValueError(f"steps must be 1 or 2, got {steps!r}")
        if init not in ("orthogonal", "keep"):
            raise ValueError(f"init must be 'orthogonal' or 'keep', got {init!r}")
        if last_layer not in ("aol", "normalized"):
            raise ValueError(f"last_layer must be 'aol' or 'normalized', got {last_layer!r}")
        smallest_std(input_std)
        self.last_layer = last_layer
        self.activation, self.steps, self.init, self._log = activation, steps, init, bool(log)
        self.eps = tuple(check_radii([eps] if isinstance(eps, int | float) else eps).tolist())
        self.input_std, self.rounding = input_std, bool(rounding)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        #: What the conversion did, one line each.
        self.changes: list[str] = []
        #: The latest certified accuracy of each stage.
        self.results: dict[str, Result] = {}
        self._refusal: Exception | None = None
        self._run: RunContext | None = None
        self._layers: list[AOLParametrization] = []
        self._pass: CertifiedPass | None = None

    @property
    def log(self) -> Any:
        """True to certify, log and report."""
        return self._log

    @log.setter
    def log(self, value: Any) -> None:
        # Lightning gives every callback its module's logging function under this name.
        if isinstance(value, bool):
            self._log = value

    # The model

    @hookimpl
    def gw_transform_model(self, module: nn.Module, run: RunContext | None) -> None:
        """Convert what is there; a model that is built later comes again."""
        self._refusal = None
        if not has_weights(module) or "" in self.exclude:
            return
        try:
            _, changes = lipschitz(
                module,
                activation=self.activation,
                steps=self.steps,
                init=self.init,
                exclude=self.exclude,
                inplace=True,
                last_layer=self.last_layer,
            )
        except ValueError as error:
            if run is None:
                raise
            # The rest of the model may not exist yet; gw_check tells when it does.
            self._refusal = error
            return
        if changes:
            self.changes = changes
            if run is None or run.trainer.is_global_zero:
                _LOG.info("AOL changed the model:\n  %s", "\n  ".join(changes))

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """Tell what is wrong with the model, which must be convertible, whole, and of float32."""
        strategy, precision = type(run.trainer.strategy).__name__, str(run.trainer.precision)
        problems = []
        if any(word in strategy for word in ("DeepSpeed", "FSDP", "ModelParallel")):
            problems.append(
                Problem(self.name, f"{strategy} shards weights, whose norms need all of them", "use strategy='ddp'")
            )
        if precision in ("bf16-true", "16-true"):
            hint = "use precision='32-true', or 'bf16-mixed' (certificates are then computed in float32)"
            problems.append(
                Problem(self.name, f"precision {precision!r} rounds weights, so their norm is not bounded", hint)
            )
        if run.ready:
            self._run = run
            problems += self._model_problems(run.module)
        return problems

    def _model_problems(self, module: nn.Module) -> list[Problem]:
        if self._refusal is not None:
            message, _, hint = str(self._refusal).partition(" -> ")
            return [Problem(self.name, f"the model cannot be made 1-Lipschitz: {message}", hint)]
        if not self._found(module) and not self.exclude:
            return [Problem(self.name, f"{type(module).__name__} has no Linear or convolution layer", "give it one")]
        return []

    def _found(self, module: nn.Module) -> list[AOLParametrization]:
        self._layers = list(parametrizations(module))
        return self._layers

    @hookimpl
    def gw_export(self, module: nn.Module) -> None:
        """Plain weights, and no marks."""
        bake(module)
        for part in module.modules():
            part._buffers.pop("groundwire_aol", None)

    # Training

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Share the rescale among the micro-batches of a window; see that certificates are possible before training."""
        shared = _may_share(trainer, pl_module)
        for layer in self._layers:
            layer.accumulate(shared)
        if self.log and batch_idx == 0 and trainer.current_epoch == 0 and self._run is not None:
            self._refuse_uncertifiable(pl_module, self._run.fields(batch))

    def _refuse_uncertifiable(self, module: nn.Module, fields: Fields) -> None:
        try:
            warn_of_range(fields.inputs, self.input_std)
            head = self._run.head if self._run is not None and classes_of(fields) is not None else None
            if head is not None and outputs_of(head.module) < 2:
                text = f"{head.name} gives one score for two classes -> give two, or only convert, with AOL(log=False)"
                raise PluginError(f"aol cannot certify this model: {text}")
            CertifiedPass(self.eps, self.input_std).bound(module, fields.inputs)
        except (UnknownLipschitzError, UnsoundError) as error:
            raise PluginError(f"aol cannot certify this model: {error}") from error

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """A window that was never stepped is given up with its gradient."""
        for layer in self._layers:
            layer.zero_accumulated()

    @hookimpl
    def gw_backward_done(self, phase: str) -> None:
        """Run the one backward through the rescale, before anybody reads a gradient."""
        for layer in self._layers:
            layer.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing is kept behind training."""
        for layer in self._layers:
            layer.reset()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the run, which is over."""
        self.on_train_end(trainer, pl_module)
        self._layers, self._run, self._pass = [], None, None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning does not call ``teardown`` when a step raises."""
        self.teardown(trainer, pl_module, "")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take no part of a model along."""
        return {**vars(self), "_layers": [], "_run": None, "_pass": None, "_refusal": None}

    # Evaluation

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """A new pass, on every rank: its end is a collective."""
        self._pass = None
        if self.log:
            half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))
            self._pass = CertifiedPass(self.eps, self.input_std, self.rounding, half).to(pl_module.device)

    on_test_epoch_start = on_validation_epoch_start

    @hookimpl
    def gw_scores(self, scores: Tensor, fields: Fields, stage: str, variant: str | None, run: RunContext) -> None:
        """Certify a batch."""
        if self._pass is None or variant is not None:
            return
        try:
            self._pass.update(run.module, scores, fields, run.head.module if run.head is not None else None)
        except (UnknownLipschitzError, UnsoundError, ValueError) as error:
            raise PluginError(f"aol cannot certify this batch: {error}") from error

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Clean and certified accuracy of the pass."""
        if self._pass is None or run.stage not in ("validate", "test"):
            return []
        done, self._pass = self._pass, None
        result = done.compute()
        if result is None:
            return []
        self.results[run.stage] = result
        for code, value in result.metrics.items():
            run.log(code, value, sync_dist=True)  # equal on all ranks; without it Lightning warns of it
        return result.findings(self.name)

    @hookimpl
    def gw_section(self, findings: list[Finding]) -> Section | None:
        """Settings, changes, certified accuracy over the radius, and radii."""
        return section(self.changes, self.results)

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """Return what the weights promise."""
        bounds = {stage: result.lipschitz for stage, result in self.results.items()}
        return {"activation": self.activation, "steps": self.steps, "last_layer": self.last_layer, "lipschitz": bounds}


def _may_share(trainer: Any, module: Any) -> bool:
    """Tell whether the window's gradient may reach raw weights at its end only.

    DDP reduces raw gradients in each backward, a scaler unscales them before ``gw_backward_done``, and under manual
    optimization or with several optimizers a window has no common end.
    """
    return bool(
        trainer.accumulate_grad_batches > 1
        and trainer.world_size == 1
        and module.automatic_optimization
        and len(trainer.optimizers) == 1
        and trainer.precision != "16-mixed"
    )
