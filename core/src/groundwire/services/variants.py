"""Evaluating a variant of the model inside a run that does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from groundwire._lightning import (
    Trainer,
    evaluation_arguments,
    evaluation_hook_arguments,
    evaluation_loop,
    fresh_pass,
    move_batch,
    one_after_another,
    takes_dataloader_iter,
)
from groundwire.batch import tensors_in
from groundwire.distributed import gathered
from groundwire.errors import PluginError
from groundwire.records import Evaluation, Stage, Variant
from groundwire.run import BatchStart, Run
from groundwire.service import Service
from groundwire.undo.loaders import loaders_restored
from groundwire.undo.without_trace import without_trace

_REDUCTIONS: dict[Any, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": max,
    "min": min,
    sum: sum,
    max: max,
    min: min,
    torch.sum: sum,
    torch.max: max,
    torch.min: min,
}


class LogMeans:
    """Takes ``self.log`` calls and reduces them over a pass, by the names and rules that Lightning uses.

    Numbers by ``reduce_fx``, a mean by batch size; metrics by their own rule; of several loaders each by itself.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[Any, list[float], list[float]]] = {}
        self._metrics: dict[str, Metric] = {}
        self.rows = 1
        self.suffix = ""

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self._metrics.clear()

    def __call__(
        self,
        name: str,
        value: Any,
        *args: Any,
        batch_size: int | None = None,
        reduce_fx: Any = "mean",
        add_dataloader_idx: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take one logged value."""
        name += self.suffix if add_dataloader_idx else ""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        _, values, weights = self._values.setdefault(name, (reduce_fx, [], []))
        values.append(float(value.detach().float().mean() if isinstance(value, Tensor) else value))
        weights.append(float(batch_size or self.rows))

    def means(self, trainer: Trainer) -> dict[str, float]:
        """Return the value of each name over the pass and over ranks; ranks may have logged different names."""
        rules = {name: reduce_fx for name, (reduce_fx, _, _) in self._values.items()}
        ranks = gathered(trainer, {name: (values, weights) for name, (_, values, weights) in self._values.items()})
        result = {}
        for name in sorted({name for rank in ranks for name in rank}):
            pairs = [pair for rank in ranks if name in rank for pair in zip(*rank[name], strict=True)]
            result[name] = _reduced(rules.get(name), pairs)
        return result | {name: float(metric.compute()) for name, metric in self._metrics.items()}


def _reduced(rule: Any, pairs: list[tuple[float, float]]) -> float:
    rule = rule.lower() if isinstance(rule, str) else rule
    if rule in _REDUCTIONS:
        return float(_REDUCTIONS[rule]([value for value, _ in pairs]))
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


class VariantService(Service):
    """Collects the variants that plugins offer, and evaluates one of them, or the model itself."""

    name = "groundwire-variants"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        run.members |= {"variants": self.variants, "evaluate": self.evaluate}

    def variants(self) -> list[Variant]:
        """Return all variants that plugins offer; see :meth:`groundwire.RunContext.variants`."""
        return list(self.run.hooks.collect("gw_variants", Variant, module=self.run.module))

    def evaluate(self, variant: Variant | None, stage: Stage) -> Evaluation:
        """Evaluate ``variant`` on the loaders of ``stage``; see :meth:`groundwire.RunContext.evaluate`."""
        trainer, module = self.run.trainer, self.run.module
        if stage not in ("validate", "test") or self.run.stage != stage:
            raise PluginError(
                f"run.evaluate(stage={stage!r}) was called while {self.run.stage!r} runs -> call it from gw_findings, "
                "where run.stage is the stage to evaluate"
            )
        if variant is not None and not isinstance(variant, Variant):
            raise PluginError(f"run.evaluate takes a Variant or None, got {variant!r} -> take one of run.variants()")
        step = f"{self._lightnings_stage}_step"
        if takes_dataloader_iter(module, step):
            raise PluginError(
                f"run.evaluate: {step} takes dataloader_iter, which cannot be read twice -> take batch, batch_idx"
            )
        log, batches = LogMeans(), 0
        name = None if variant is None else variant.name
        with (
            without_trace(module, trainer, log),
            loaders_restored(self.run.loaders(stage)),
            nullcontext() if variant is None else variant.apply(),
            torch.no_grad(),
        ):
            self._begin_epoch()
            log.clear()
            for batch, batch_idx, dataloader_idx in self._batches(stage):
                self._step(log, batch, batch_idx, dataloader_idx, name)
                batches += 1
            log.suffix = ""
            if not batches:
                raise _one_shot(self.run.loaders(stage)[0])
            self._call("epoch_end")
            metrics = log.means(trainer)
        return Evaluation(name, metrics, batches)

    def _begin_epoch(self) -> None:
        """Begin a pass: the epoch that just ended still lies in the module's lists and metrics."""
        self._call("epoch_end")
        for child in self.run.module.modules():
            if isinstance(child, Metric):
                child.reset()
        self.run.module.eval()
        self._call("epoch_start")

    def _batches(self, stage: str) -> Iterator[Any]:
        """Yield a fresh pass over the stage's loaders with the Trainer's limits."""
        for loader in self.run.loaders(stage):
            if hasattr(loader, "__next__"):
                raise _one_shot(loader)
        yield from fresh_pass(self.run.trainer)

    def _step(self, log: LogMeans, batch: Any, batch_idx: int, dataloader_idx: int, variant: str | None) -> None:
        """Evaluate one batch as the loop does; its scores are handed out for a variant, whose own have not been yet."""
        run, trainer, loop = self.run, self.run.trainer, evaluation_loop(self.run.trainer)
        batch = move_batch(trainer, batch, dataloader_idx)
        stage: Stage = "test" if trainer.testing else "validate"
        run.start_batch(BatchStart(batch, stage, batch_idx, dataloader_idx, variant, observed=variant is not None))
        log.suffix = f"/dataloader_idx_{dataloader_idx}" if one_after_another(loop) else ""
        log.rows = next((len(t) for t in tensors_in(batch) if t.ndim), 1)
        around = evaluation_hook_arguments(loop, batch, batch_idx, dataloader_idx)
        self._call("batch_start", *around)
        output = getattr(trainer.strategy, f"{self._lightnings_stage}_step")(
            *evaluation_arguments(trainer, loop, batch, batch_idx, dataloader_idx)
        )
        if variant is not None:
            for action in run.after_variant_batch:
                action(batch, stage, variant)
        self._call("batch_end", output, *around)

    def _call(self, which: str, *arguments: Any) -> None:
        """Call the user's own hook: metrics are often collected in lists and logged at the end."""
        getattr(self.run.module, f"on_{self._lightnings_stage}_{which}")(*arguments)

    @property
    def _lightnings_stage(self) -> str:
        return "test" if self.run.trainer.testing else "validation"


def _one_shot(loader: Any) -> PluginError:
    return PluginError(f"a {type(loader).__name__} can be read only once -> give a loader that can be iterated again")
