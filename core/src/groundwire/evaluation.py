"""Evaluating another version of the model inside a run that does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from groundwire._lightning import (
    evaluation_arguments,
    evaluation_hook_arguments,
    evaluation_loop,
    fresh_pass,
    move_batch,
)
from groundwire.errors import PluginError
from groundwire.guard import unseen
from groundwire.ranks import gathered
from groundwire.types import Evaluation, Variant
from groundwire.window import tensors_in

if TYPE_CHECKING:
    from groundwire.host import Host


_REDUCTIONS: dict[Any, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": max,
    "min": min,
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
        """Receive one logged value."""
        name += self.suffix if add_dataloader_idx else ""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        _, values, weights = self._values.setdefault(name, (reduce_fx, [], []))
        values.append(float(value.detach().float().mean() if isinstance(value, Tensor) else value))
        weights.append(float(batch_size or self.rows))

    def means(self, trainer: Any) -> dict[str, float]:
        """Value of each name over the pass and over ranks; ranks may have logged different names."""
        rules = {name: reduce_fx for name, (reduce_fx, _, _) in self._values.items()}
        ranks = gathered(trainer, {name: (values, weights) for name, (_, values, weights) in self._values.items()})
        result = {}
        for name in sorted({name for rank in ranks for name in rank}):
            pairs = [pair for rank in ranks if name in rank for pair in zip(*rank[name], strict=True)]
            result[name] = _reduced(rules.get(name), pairs)
        return result | {name: float(metric.compute()) for name, metric in self._metrics.items()}


def _reduced(rule: Any, pairs: list[tuple[float, float]]) -> float:
    if rule in _REDUCTIONS:
        return float(_REDUCTIONS[rule]([value for value, _ in pairs]))
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def evaluate(host: Host, variant: Variant | None, stage: str) -> Evaluation:
    """See :meth:`groundwire.RunContext.evaluate`."""
    trainer, module = host.trainer, host.module
    if stage not in ("validate", "test") or host.stage != stage:
        raise PluginError(
            f"run.evaluate(stage={stage!r}) was called while {host.stage!r} runs -> call it from gw_findings, where "
            "run.stage is the stage to evaluate"
        )
    if variant is not None and not isinstance(variant, Variant):
        raise PluginError(f"run.evaluate takes a Variant or None, got {variant!r} -> take one of run.variants()")
    log, batches = LogMeans(), 0
    name = None if variant is None else variant.name
    with unseen(module, trainer, log), nullcontext() if variant is None else variant.apply(), torch.no_grad():
        _begin_epoch(host)
        log.clear()
        for batch, batch_idx, dataloader_idx in _batches(host, stage):
            _step(host, log, batch, batch_idx, dataloader_idx, name)
            batches += 1
        log.suffix = ""
        if not batches:
            raise _one_shot(host.ids.loaders(host.stage)[0])
        _hook(host, "epoch_end")
        metrics = log.means(trainer)
    return Evaluation(name, metrics, batches)


def _step(host: Host, log: LogMeans, batch: Any, batch_idx: int, dataloader_idx: int, variant: str | None) -> None:
    trainer = host.trainer
    batch = move_batch(trainer, batch, dataloader_idx)
    host.before_batch(batch, host.stage, dataloader_idx, variant)
    log.suffix = f"/dataloader_idx_{dataloader_idx}" if len(host.ids.loaders(host.stage)) > 1 else ""
    log.rows = next((len(t) for t in tensors_in(batch) if t.ndim), 1)
    loop = evaluation_loop(trainer)
    around = evaluation_hook_arguments(loop, batch, batch_idx, dataloader_idx)
    _hook(host, "batch_start", *around)
    output = getattr(trainer.strategy, f"{_stage(host)}_step")(
        *evaluation_arguments(trainer, loop, batch, batch_idx, dataloader_idx)
    )
    if variant is not None:  # the model's own scores were handed out when it was evaluated
        host.scores.after_batch(batch, host.stage, variant)
    host.scores.stop()
    _hook(host, "batch_end", output, *around)


def _batches(host: Host, stage: str) -> Iterator[Any]:
    """A fresh pass over the stage's loaders with the Trainer's limits."""
    for loader in host.ids.loaders(stage):
        if hasattr(loader, "__next__"):
            raise _one_shot(loader)
    yield from fresh_pass(host.trainer)


def _begin_epoch(host: Host) -> None:
    """As the module is at the start of a pass: the epoch that just ended still lies in its lists and metrics."""
    _hook(host, "epoch_end")
    for child in host.module.modules():
        if isinstance(child, Metric):
            child.reset()
    host.module.eval()
    _hook(host, "epoch_start")


def _hook(host: Host, which: str, *arguments: Any) -> None:
    """The user's own hook: metrics are often collected in lists and logged at the end."""
    getattr(host.module, f"on_{_stage(host)}_{which}")(*arguments)


def _stage(host: Host) -> str:
    return "test" if host.trainer.testing else "validation"


def _one_shot(loader: Any) -> PluginError:
    return PluginError(f"a {type(loader).__name__} can be read only once -> give a loader that can be iterated again")
