"""Evaluating another version of the model inside a run that does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torchmetrics import Metric

from groundwire._lightning import evaluation_arguments, evaluation_loop, move_batch
from groundwire.errors import PluginError
from groundwire.guard import unseen
from groundwire.types import Evaluation, Variant
from groundwire.window import tensors_in

if TYPE_CHECKING:
    from groundwire.host import Host


class LogMeans:
    """Takes ``self.log`` calls and averages them over a pass: numbers by batch size, metrics by their own rule."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._metrics: dict[str, Metric] = {}
        self.rows = 1

    def __call__(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """Receive one logged value."""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        weight = float(batch_size or self.rows)
        number = float(value.detach().float().mean() if isinstance(value, Tensor) else value)
        self._sums[name] = self._sums.get(name, 0.0) + number * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self, trainer: Any) -> dict[str, float]:
        """Mean of each name over the pass and over ranks."""
        means = {}
        for name, total in self._sums.items():
            pair = torch.tensor([total, self._weights[name]], dtype=torch.float64, device=trainer.strategy.root_device)
            total_all, weight = trainer.strategy.reduce(pair, reduce_op="sum").tolist()
            means[name] = total_all / weight
        return means | {name: float(metric.compute()) for name, metric in self._metrics.items()}


def evaluate(host: Host, variant: Variant | None, stage: str) -> Evaluation:
    """See :meth:`groundwire.RunContext.evaluate`."""
    trainer, module = host.trainer, host.module
    if stage not in ("validate", "test") or host.stage != stage:
        raise PluginError(
            f"run.evaluate(stage={stage!r}) was called while {host.stage!r} runs -> call it from gw_findings, where "
            "run.stage is the stage to evaluate"
        )
    log, batches = LogMeans(), 0
    name = None if variant is None else variant.name
    with unseen(module, trainer, log), nullcontext() if variant is None else variant.apply(), torch.no_grad():
        _reset_metrics(module)
        module.eval()
        for batch, batch_idx, dataloader_idx in _batches(host, stage):
            _step(host, log, batch, batch_idx, dataloader_idx, name)
            batches += 1
        metrics = log.means(trainer)
    return Evaluation(name, metrics, batches)


def _step(host: Host, log: LogMeans, batch: Any, batch_idx: int, dataloader_idx: int, variant: str | None) -> None:
    trainer = host.trainer
    batch = move_batch(trainer, batch, dataloader_idx)
    host.before_batch(batch, host.stage, dataloader_idx)
    log.rows = next((len(t) for t in tensors_in(batch) if t.ndim), 1)
    arguments = evaluation_arguments(trainer, evaluation_loop(trainer), batch, batch_idx, dataloader_idx)
    getattr(trainer.strategy, "test_step" if trainer.testing else "validation_step")(*arguments)
    host.scores.after_batch(batch, host.stage, variant)


def _batches(host: Host, stage: str) -> Iterator[Any]:
    """A fresh pass over the stage's loaders with the Trainer's limits."""
    trainer = host.trainer
    loaders = host.ids.loaders(stage)
    for loader in loaders:
        if hasattr(loader, "__next__"):
            raise PluginError(
                f"a {type(loader).__name__} can be read only once -> give a loader that can be iterated again"
            )
    combined = CombinedLoader(loaders, "sequential")
    combined.limits = list(trainer.num_test_batches if stage == "test" else trainer.num_val_batches)
    iter(combined)
    yield from combined


def _reset_metrics(module: torch.nn.Module) -> None:
    """A pass of its own: the metrics hold the epoch's own counts at this moment (and get them back)."""
    for child in module.modules():
        if isinstance(child, Metric):
            child.reset()
