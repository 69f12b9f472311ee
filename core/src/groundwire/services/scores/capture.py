"""The model's scores, captured from the forward pass that happens anyway."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundwire._lightning import Trainer, takes_dataloader_iter
from groundwire.errors import PluginError, Problem
from groundwire.hooks.markers import hookimpl
from groundwire.hooks.ordering import name_of
from groundwire.records import Fields, Head
from groundwire.run import BatchStart, Run
from groundwire.service import Service
from groundwire.services.scores.head import find_head, named_head
from groundwire.undo.without_trace import without_trace

STAGES = ("train", "validate", "test", "predict")


class Capture:
    """A forward hook that keeps what a layer got and gave while it listens. A copy of it keeps nothing.

    Attributes:
        listening: Whether outputs are kept.
        outputs: Output of each forward pass, detached.
        features: Input of each forward pass, detached, if asked for.
    """

    def __init__(self, features: bool) -> None:
        self._wants_features = features
        self.listening = False
        self.clear()

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """Keep ``output``."""
        if not self.listening:
            return
        self.outputs.append(output.detach())
        if self._wants_features:
            self.features.append(arguments[0].detach())

    def __reduce__(self) -> Any:
        return _inert, ()

    def clear(self) -> None:
        """Forget everything."""
        self.outputs: list[Tensor] = []
        self.features: list[Tensor] = []


def _ignore(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
    """Do nothing, in the place of a capture hook that was copied."""


def _inert() -> Any:
    return _ignore


def combine(outputs: list[Tensor], rows: int | None) -> Tensor | None:
    """Return one tensor for a batch of ``rows`` rows from the outputs of one or several forward passes.

    The last one if each has all rows; all of them, one after the other, if they sum to the batch.

    Returns:
        None if there is no output.

    Raises:
        PluginError: The rows fit neither rule.

    Example:
        >>> combine([torch.zeros(2, 3), torch.ones(2, 3)], rows=4).shape
        torch.Size([4, 3])
    """
    if not outputs:
        return None
    counts = [len(output) for output in outputs]
    if rows is None or all(count == rows for count in counts):
        return outputs[-1]
    if sum(counts) == rows:
        return torch.cat(outputs)
    raise PluginError(f"forward passes of {counts} rows in one step do not make a batch of {rows} rows")


class ScoreService(Service):
    """Finds the head when someone needs it, captures its output, and hands scores to ``gw_scores``."""

    name = "groundwire-scores"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._raw: Capture | None = None
        self._final: Capture | None = None
        self._ends: tuple[int, int] = (0, 0)
        self._seen: set[str] = set()
        self._silent: set[str] = set()
        self._receivers: dict[str, list[str]] = {}
        run.members |= {"head": None, "raw_scores": None, "features": None}
        run.extra_passes.append(self.paused)

    @property
    def head(self) -> Head | None:
        """The layer that gives the scores, once it is known."""
        head: Head | None = self.run.members["head"]
        return head

    @hookimpl(tryfirst=True)
    def gw_check(self) -> list[Problem]:
        """Refuse stages that do not exist; then take the head that the user named, to the run or to a plugin."""
        return self._named() if self.run.ready else self._unknown_stages()

    def _unknown_stages(self) -> list[Problem]:
        wrong = {p: set(getattr(p, "score_stages", ())) - set(STAGES) for p in self.run.plugins}
        hint = f"use some of {', '.join(STAGES)}"
        return [Problem(name_of(p), f"score_stages has {sorted(s)}", hint) for p, s in wrong.items() if s]

    def _named(self) -> list[Problem]:
        run = self.run
        names = {f"head={run.settings.head!r} of Plugins": run.settings.head}
        names |= {f"head={p.head!r} of {name_of(p)}": p.head for p in run.plugins if hasattr(p, "head")}
        named = {text: name for text, name in names.items() if name is not None}
        if len(set(named.values())) > 1:
            return [Problem("Plugins", f"two heads are named: {' and '.join(named)}", "name one")]
        try:
            run.members["head"] = next((named_head(run.module, name) for name in named.values()), None)
        except PluginError as error:
            message, _, hint = str(error).partition(" -> ")
            return [Problem("Plugins", message, hint)]
        if self.head is None and self._takes_iterator():
            text = "training_step takes dataloader_iter, so the head of training scores cannot be found"
            return [Problem("Plugins", text, "name it with Plugins(head=...)")]
        return []

    def _takes_iterator(self) -> bool:
        """Tell whether training scores are wanted of steps that take their batches by themselves."""
        run = self.run
        return run.function == "fit" and "train" in self._receivers and takes_dataloader_iter(run.module)

    def open(self) -> None:
        """Note who wants the scores of which stage."""
        run = self.run
        for name in run.hooks.owners("gw_scores"):
            for stage in getattr(run.implementers.get(name), "score_stages", ("validate", "test")):
                self._receivers.setdefault(stage, []).append(name)
        for stage in self._receivers:
            run.before_batch[stage].append(self._find_head)
            run.before_forward[stage].append(self._listen)
        if "validate" in self._receivers:
            run.before_batch["sanity"].append(self._find_head)
        run.after_variant_batch.append(self.hand_out)

    def start(self) -> None:
        """Attach at once where no batch is known before its step."""
        if self._takes_iterator() and self.head is not None:
            self._attach(self.head.module)

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        """Return the hooks after the batches of the stages that somebody wants."""
        ends = {
            "train": ("on_train_batch_end", self._train_batch_end),
            "validate": ("on_validation_batch_end", self._batch_end),
            "test": ("on_test_batch_end", self._batch_end),
            "predict": ("on_predict_batch_end", self._batch_end),
        }
        found: dict[str, Callable[..., Any]] = {ends[stage][0]: ends[stage][1] for stage in self._receivers}
        for stage in self._receivers:
            place = "validation" if stage == "validate" else stage
            found[f"on_{place}_epoch_end"] = functools.partial(self._epoch_end, stage)
        if self._takes_iterator():
            found["on_train_batch_start"] = lambda *_: self._listen(BatchStart(None, "train"))
        return found

    def _train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.hand_out(batch, "train", skipped=not outputs)

    def _batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self.hand_out(batch, self.run.stage, skipped=outputs is None)

    def _epoch_end(self, stage: str, *_: Any) -> None:
        """Refuse an epoch without any scores: what looked like skipped steps is a head that never runs."""
        if stage in self._silent - self._seen and not self.run.trainer.sanity_checking:
            raise PluginError(self._bypassed())
        self._silent.discard(stage)

    def _find_head(self, start: BatchStart) -> None:
        """Find the head and attach to it."""
        run = self.run
        if self._raw is not None:
            return
        head = self.head
        if head is None:
            with without_trace(run.module, run.trainer), run.trainer.precision_plugin.forward_context():
                head = run.members["head"] = find_head(run.module, run.fields(start.batch), start.batch)
        self._attach(head.module)

    def _attach(self, layer: nn.Module) -> None:
        """Become the first and the last of the layer's forward hooks."""
        self._raw = Capture(any(getattr(p, "needs_features", False) for p in self.run.plugins))
        self._final = Capture(features=False)
        handles = [layer.register_forward_hook(capture) for capture in (self._raw, self._final)]
        self._ends = (handles[0].id, handles[1].id)
        for handle in handles:
            self.run.undo.callback(handle.remove)

    def _listen(self, start: BatchStart) -> None:
        """Capture the forward passes of this batch from now on."""
        self._stop()
        if not start.observed or self._raw is None or self._final is None or self.head is None:
            return
        self._raw.listening = self._final.listening = True
        hooks = self.head.module._forward_hooks
        if (next(iter(hooks)), next(reversed(hooks))) != self._ends:
            # Hooks that came later stand outside: raw scores would hold a plugin's shift, and final ones would not.
            hooks.move_to_end(self._ends[0], last=False)
            hooks.move_to_end(self._ends[1])

    def _stop(self) -> None:
        """Forget what was captured, and capture nothing until the next batch."""
        for capture in (self._raw, self._final):
            if capture is not None:
                capture.listening = False
                capture.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager for forward passes that are not the step's own, so that they are not its scores."""
        captures = [c for c in (self._raw, self._final) if c is not None and c.listening]
        for capture in captures:
            capture.listening = False
        try:
            yield
        finally:
            for capture in captures:
                capture.listening = True

    def hand_out(self, batch: Any, stage: str, variant: str | None = None, skipped: bool = False) -> None:
        """Give the captured scores to those who want them.

        Args:
            batch: The batch.
            stage: Its stage.
            variant: The variant whose scores they are.
            skipped: Whether the step returned nothing: it may have left the batch out without running the model.

        Raises:
            PluginError: The head did not run, or its passes do not make up the batch.
        """
        if stage not in self._receivers or self._raw is None or self._final is None:
            return
        try:
            fields = self.run.fields(batch)
            rows = _rows(fields)
            raw, scores = combine(self._raw.outputs, rows), combine(self._final.outputs, rows)
            if raw is None and (skipped or stage in self._seen):
                self._silent.add(stage)
                return  # a step that the module skipped
            if raw is None or scores is None:
                raise PluginError(self._bypassed())
            self._seen.add(stage)
            features = combine(self._raw.features, rows)
            self.run.members |= {"raw_scores": raw.float(), "features": features}
            arguments = {"scores": scores.float(), "fields": fields, "stage": stage, "variant": variant}
            self.run.hooks.call("gw_scores", only=self._receivers[stage], **arguments)
        finally:
            self._stop()

    def _bypassed(self) -> str:
        name = self.head.name if self.head else "?"
        return (
            f"the head {name!r} did not run in this step, or runs inside a compiled module that was called before the "
            "run and ignores new hooks -> name another layer with Plugins(head=...), or compile after the run starts"
        )


def _rows(fields: Fields) -> int | None:
    for value in (fields.targets, fields.inputs):
        if hasattr(value, "shape") and len(value.shape):
            return int(value.shape[0])
    return None
