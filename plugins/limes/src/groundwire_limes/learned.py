"""What outlives a run: the stream's history, the place in it, and which head it corrects. It goes into checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from groundwire import Head, PluginError
from groundwire.modules import outputs_of
from groundwire_limes.extrapolator import PriorExtrapolator
from groundwire_limes.timeline import Timeline
from groundwire_limes.unlabelled import Memory

FORMAT = 1


@dataclass
class Learned:
    """What was learned of one stream.

    Attributes:
        line: History of the stream; None until a head told the number of classes.
        batches: Training batches so far.
        head: Name of the corrected layer.
        conv: Whether it is a convolution, with classes in dimension 1.
        memory: Scores and labels of recent steps, for batches without labels.
    """

    line: Timeline | None = None
    batches: int = 0
    head: str | None = None
    conv: bool = False
    memory: Memory = field(default_factory=Memory)

    def take_head(self, head: Head, extrapolator: Callable[[int], PriorExtrapolator], lateness: int) -> Timeline:
        """Correct ``head`` from now on.

        Args:
            head: The layer that gives the scores.
            extrapolator: Makes one for so many classes.
            lateness: Steps that a batch may be late.

        Raises:
            PluginError: The head has other classes than what was learned.
        """
        outputs = outputs_of(head.module)
        classes = max(2, outputs)
        if self.line is None:
            self.line = Timeline(extrapolator(classes), outputs, lateness)
        known = self.line.extrapolator.num_classes
        if known != classes:
            raise PluginError(
                f"limes: what was learned has {known} classes and the head {head.name!r} has {classes} -> "
                "use the model that it was learned with, or a new LIMES()"
            )
        self.head, self.conv = head.name, hasattr(head.module, "kernel_size")
        return self.line

    @property
    def next_step(self) -> int:
        """The step after the newest one that has labels; 0 if there is none."""
        last = None if self.line is None else self.line.informed().extrapolator.last_step
        return 0 if last is None else last + 1

    def history(self) -> Timeline:
        """The history.

        Raises:
            PluginError: There is none yet.
        """
        if self.line is None:
            raise PluginError("limes: nothing was observed yet -> fit first, or load a checkpoint")
        return self.line.informed()

    def state_dict(self, arguments: dict[str, Any], memory: bool) -> dict[str, Any]:
        """Plain types, with the ``arguments`` that forecasts depend on; with scores and labels if ``memory``."""
        line = self.line
        assert line is not None
        return {
            "format": FORMAT,
            "arguments": arguments,
            "batches": self.batches,
            "head": self.head,
            "conv": self.conv,
            "line": line.state_dict(),
            "memory": self.memory.state_dict() if memory else None,
        }

    @classmethod
    def restored(
        cls,
        state: Mapping[str, Any],
        arguments: dict[str, Any],
        extrapolator: Callable[[int], PriorExtrapolator],
        lateness: int,
    ) -> Learned:
        """Inverse of :meth:`state_dict`.

        Raises:
            PluginError: It was saved with other arguments, which are listed, or by a newer version.
        """
        if state.get("format") != FORMAT:
            raise PluginError(f"limes: the checkpoint has format {state.get('format')}, this version reads {FORMAT}")
        saved = state["arguments"]
        other = [
            f"{n}: {saved.get(n)!r} in the checkpoint, {here!r} here"
            for n, here in arguments.items()
            if saved.get(n) != here
        ]
        if other:
            raise PluginError(f"limes: the checkpoint was saved with other arguments ({'; '.join(other)}) -> use those")
        made = extrapolator(state["line"]["extrapolator"]["num_classes"])
        line = Timeline.restored(state["line"], made, lateness)
        memory = Memory()
        if state["memory"] is not None:
            memory.load_state_dict(state["memory"])
        return cls(line, state["batches"], state["head"], state["conv"], memory)
