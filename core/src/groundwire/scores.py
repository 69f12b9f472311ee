"""The model's scores, taken from the forward pass that happens anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groundwire._lightning import takes_dataloader_iter
from groundwire.errors import PluginError
from groundwire.guard import unseen
from groundwire.head import find_head, named_head
from groundwire.order import name_of
from groundwire.types import Fields, Head, Problem

if TYPE_CHECKING:
    from groundwire.host import Host


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
    """What a copied capture hook does: nothing."""


def _inert() -> Any:
    return _ignore


def combine(outputs: list[Tensor], rows: int | None) -> Tensor | None:
    """One tensor for a batch of ``rows`` rows from the outputs of one or several forward passes.

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


class ScoreService:
    """Finds the head when someone needs it, captures its output, and hands scores to ``gw_scores``."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._raw: Capture | None = None
        self._final: Capture | None = None
        self._ends: tuple[int, int] = (0, 0)
        self._seen: set[str] = set()
        self._receivers: dict[str, list[str]] = {}
        self.head: Head | None = None
        self.raw: Tensor | None = None
        self.features: Tensor | None = None

    def problems(self) -> list[Problem]:
        """Stages that do not exist."""
        wrong = {p: set(getattr(p, "score_stages", ())) - set(STAGES) for p in self._host.plugins}
        hint = f"use some of {', '.join(STAGES)}"
        return [Problem(name_of(p), f"score_stages has {sorted(s)}", hint) for p, s in wrong.items() if s]

    def open(self) -> None:
        """Note who wants the scores of which stage."""
        by_name = self._host.by_name
        for name in self._host.hooks.owners("gw_scores"):
            for stage in getattr(by_name.get(name), "score_stages", ("validate", "test")):
                self._receivers.setdefault(stage, []).append(name)

    def wanted(self, stage: str) -> bool:
        """Whether somebody wants the scores of ``stage``."""
        return stage in self._receivers

    def ready(self) -> list[Problem]:
        """The model exists: take the head that the user named, to the run or to a plugin."""
        names = {f"head={self._host.settings.head!r} of Plugins": self._host.settings.head}
        names |= {f"head={p.head!r} of {name_of(p)}": p.head for p in self._host.plugins if hasattr(p, "head")}
        named = {text: name for text, name in names.items() if name is not None}
        if len(set(named.values())) > 1:
            return [Problem("Plugins", f"two heads are named: {' and '.join(named)}", "name one")]
        try:
            self.head = next((named_head(self._host.module, name) for name in named.values()), None)
        except PluginError as error:
            message, _, hint = str(error).partition(" -> ")
            return [Problem("Plugins", message, hint)]
        if self._host.fn != "fit" or not self.wanted("train") or not takes_dataloader_iter(self._host.module):
            return []
        if self.head is not None:  # no batch is known before its step
            self._attach(self.head.module)
            return []
        text = "training_step takes dataloader_iter, so the head of training scores cannot be found"
        return [Problem("Plugins", text, "name it with Plugins(head=...)")]

    def find(self, batch: Any, stage: str) -> None:
        """Find the head and attach to it, if somebody wants this stage's scores."""
        if stage not in self._receivers or self._raw is not None:
            return
        if self.head is None:
            with unseen(self._host.module, self._host.trainer), self._host.trainer.precision_plugin.forward_context():
                self.head = find_head(self._host.module, self._host.fields(batch).inputs)
        self._attach(self.head.module)

    def before_batch(self, stage: str) -> None:
        """Capture the forward passes of this batch from now on, if somebody wants its scores."""
        self.stop()
        if stage not in self._receivers or self._raw is None or self._final is None or self.head is None:
            return
        self._raw.listening = self._final.listening = True
        hooks = self.head.module._forward_hooks
        if (next(iter(hooks)), next(reversed(hooks))) != self._ends:
            # Hooks that came later stand outside: raw scores would hold a plugin's shift, and final ones would not.
            hooks.move_to_end(self._ends[0], last=False)
            hooks.move_to_end(self._ends[1])

    def after_batch(self, batch: Any, stage: str, variant: str | None = None) -> None:
        """Hand the captured scores out."""
        if stage not in self._receivers or self._raw is None or self._final is None:
            return
        try:
            self._hand_out(self._raw, self._final, batch, stage, variant)
        finally:
            self.stop()

    def _hand_out(self, first: Capture, last: Capture, batch: Any, stage: str, variant: str | None) -> None:
        fields = self._host.fields(batch)
        rows = _rows(fields)
        raw, scores = combine(first.outputs, rows), combine(last.outputs, rows)
        if raw is None and stage in self._seen:
            return  # a step that the module skipped
        if raw is None or scores is None:
            raise PluginError(self._bypassed())
        self._seen.add(stage)
        self.raw = raw.float()
        self.features = combine(first.features, rows)
        arguments = {"scores": scores.float(), "fields": fields, "stage": stage, "variant": variant}
        self._host.hooks.call("gw_scores", only=self._receivers[stage], **arguments)

    def stop(self) -> None:
        """Forget what was captured, and capture nothing until the next batch."""
        for capture in (self._raw, self._final):
            if capture is not None:
                capture.listening = False
                capture.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Forward passes that happen meanwhile are not the step's own, so they are not its scores."""
        captures = [c for c in (self._raw, self._final) if c is not None and c.listening]
        for capture in captures:
            capture.listening = False
        try:
            yield
        finally:
            for capture in captures:
                capture.listening = True

    def _attach(self, layer: nn.Module) -> None:
        """Listen as the first and the last of the layer's forward hooks."""
        self._raw = Capture(any(getattr(p, "needs_features", False) for p in self._host.plugins))
        self._final = Capture(features=False)
        handles = [layer.register_forward_hook(capture) for capture in (self._raw, self._final)]
        self._ends = (handles[0].id, handles[1].id)
        for handle in handles:
            self._host.stack.callback(handle.remove)

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
