"""The model's scores, taken from the forward pass that happens anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groundwire._lightning import kept_from_broadcast
from groundwire.errors import PluginError
from groundwire.guard import unseen
from groundwire.head import find_head, named_head
from groundwire.offset import BUFFER, forget_rows, is_compiled, moves_scores, offset_of, offset_on, write_offset
from groundwire.order import name_of
from groundwire.types import Fields, Head, Problem
from groundwire.window import tensors_in

if TYPE_CHECKING:
    from groundwire.host import Host


STAGES = ("train", "validate", "test", "predict")


class Capture:
    """A forward hook that keeps what a layer got and gave. A copy of it keeps nothing."""

    def __init__(self, features: bool) -> None:
        self._wants_features = features
        self.clear()

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """Keep ``output`` (before any offset, which is added by a later hook)."""
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
        self._capture: Capture | None = None
        self.offset_owner: str | None = None
        self._probed = False
        self._seen: set[str] = set()
        self._receivers: dict[str, list[str]] = {}
        self._corrected: set[str] = set()
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
        takers = self._host.hooks.takers("gw_scores", "scores")
        for name in self._host.hooks.owners("gw_scores"):
            for stage in getattr(by_name.get(name), "score_stages", ("validate", "test")):
                self._receivers.setdefault(stage, []).append(name)
                if name in takers:
                    self._corrected.add(stage)

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
        return []

    def before_batch(self, batch: Any, stage: str) -> None:
        """Start capturing if somebody wants this stage's scores; see that an offset is not bypassed."""
        if self.offset_owner is not None and not self._probed:
            self._probe(batch)
        if stage not in self._receivers:
            return
        if self._capture is None:
            self._attach(batch)
        assert self._capture is not None
        self._capture.clear()

    def after_batch(self, batch: Any, stage: str, variant: str | None = None) -> None:
        """Hand the captured scores out."""
        if stage not in self._receivers or self._capture is None:
            return
        fields = self._host.fields(batch)
        rows = _rows(fields)
        raw = combine(self._capture.outputs, rows)
        if raw is None and stage in self._seen:
            return  # a step that the module skipped
        if raw is None:
            raise PluginError(self._bypassed())
        self._seen.add(stage)
        self.raw = raw.float()
        self.features = combine(self._capture.features, rows)
        # To add the offset again costs as much as the hook that added it: only for who takes the sum.
        scores = self._offset(self.raw) if stage in self._corrected else self.raw
        arguments = {"scores": scores, "fields": fields, "stage": stage, "variant": variant}
        self._host.hooks.call("gw_scores", only=self._receivers[stage], **arguments)
        self._capture.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Forward passes that happen meanwhile are not the step's own, so they are not its scores."""
        capture = self._capture
        before = (capture.outputs, capture.features) if capture is not None else None
        if capture is not None:
            capture.clear()
        try:
            yield
        finally:
            if capture is not None and before is not None:
                capture.outputs, capture.features = before

    def set_offset(self, owner: str, vector: Tensor) -> None:
        """See :meth:`RunContext.offset`."""
        if self.head is None:
            raise PluginError("an offset needs the head, which is not known yet -> pass Plugins(head=...)")
        if self.offset_owner is None:
            self._host.refuse_early_averaging(owner)
            self._host.stack.enter_context(offset_on(self.head.module))
            name = f"{self.head.name}.{BUFFER}"
            self._host.stack.enter_context(kept_from_broadcast(self._host.trainer, name))
            self.offset_owner = owner
        if self.offset_owner != owner:
            raise PluginError(
                f"{owner!r} and {self.offset_owner!r} both correct the head {self.head.name!r} -> keep one of them"
            )
        write_offset(self.head.module, vector)

    def after_epoch(self) -> None:
        """Whoever runs the module now has another number of rows than the last batch."""
        if self.head is not None:
            forget_rows(self.head.module)

    def _probe(self, batch: Any) -> None:
        """A module compiled and called before the run ignores new hooks, without a message."""
        self._probed = True
        module, head = self._host.module, self.head
        if head is None or not is_compiled(module):
            return

        def forward() -> Tensor:
            inputs = self._host.fields(batch).inputs
            output = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
            return next(tensors_in(list(output.values()) if isinstance(output, Mapping) else output))

        with unseen(module, self._host.trainer), self._host.trainer.precision_plugin.forward_context():
            module.eval()
            if not moves_scores(head.module, forward):
                raise PluginError(f"{self.offset_owner!r} cannot correct the scores: {self._bypassed()}")

    def _offset(self, raw: Tensor) -> Tensor:
        if self.offset_owner is None or self.head is None:
            return raw
        return raw + offset_of(self.head.module, raw)

    def _attach(self, batch: Any) -> None:
        if self.head is None:
            with unseen(self._host.module, self._host.trainer), self._host.trainer.precision_plugin.forward_context():
                self.head = find_head(self._host.module, self._host.fields(batch).inputs)
        self._capture = Capture(any(getattr(p, "needs_features", False) for p in self._host.plugins))
        # First of the layer's hooks, so that it sees the scores before an offset is added.
        handle = self.head.module.register_forward_hook(self._capture, prepend=True)
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
