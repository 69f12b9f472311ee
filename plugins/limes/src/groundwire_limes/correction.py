"""What is written into the head for a batch: one vector, or one for each row where rows belong to several steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from groundwire import RunContext
from groundwire.modules import outputs_of
from groundwire_limes.adaptation import adapted_offsets
from groundwire_limes.clock import Steps
from groundwire_limes.distributed import Ranks
from groundwire_limes.tally import exact
from groundwire_limes.timeline import Timeline
from groundwire_limes.unlabelled import Memory

TrainingPrior = Literal["running", "forecast", "realised"]


@dataclass(frozen=True)
class Correction:
    """The offset of a run's head.

    Attributes:
        owner: Name of the plugin, for the head's offset slot.
        run: With a head that is known.
        line: Stream whose priors are forecast.
        ranks: Processes that must agree.
        training_prior: What corrects training batches.
    """

    owner: str
    run: RunContext
    line: Timeline
    ranks: Ranks
    training_prior: TrainingPrior

    def train(self, steps: Steps, agreed: int, counted: bool) -> None:
        """Correct the head for a training batch; all ranks call it.

        Args:
            steps: Of the batch's rows.
            agreed: The step that all ranks are at.
            counted: Whether the labels of the batch will be counted; if not, the forecast corrects it.
        """
        if counted and self.training_prior == "running":
            running = self._running(agreed)  # a sum over the ranks, also where a rank has no row of that step
            self._write(steps, lambda step: running if step == agreed else self._forecast(step))
        elif counted and self.training_prior == "realised":
            self._write(steps, self._realised)
        else:
            self._write(steps, self._forecast)

    def evaluate(self, steps: Steps) -> None:
        """Correct the head for a batch that is only predicted."""
        self._write(steps, self._forecast)

    def adapt(self, memory: Memory, batch: Any, steps: Steps) -> None:
        """Move the prior of this batch to what its scores say, if past labels allow it."""
        offsets = adapted_offsets(self.line, memory, self.run, batch, steps)
        if offsets is not None:
            self.run.offset(self.owner, offsets)

    def omit(self) -> None:
        """Leave the scores of the coming batches as they are."""
        assert self.run.head is not None
        self.run.offset(self.owner, torch.zeros(outputs_of(self.run.head.module), device=self._device))

    def _write(self, steps: Steps, vector: Callable[[int], Tensor]) -> None:
        if isinstance(steps.keys, int):
            self.run.offset(self.owner, vector(steps.keys))
        else:
            vectors = {step: vector(step) for step in steps.distinct}
            self.run.offset(self.owner, torch.stack([vectors[step].float() for step in steps.keys.tolist()]))

    @property
    def _device(self) -> torch.device:
        assert self.run.head is not None
        parameter: Tensor = next(self.run.head.module.parameters())
        return parameter.device

    def _forecast(self, step: int) -> Tensor:
        return self.line.offset(step, self._device)

    def _running(self, step: int) -> Tensor:
        new = self.line.tally.pending(step)
        if new is None:
            device = self._device
            new = torch.zeros(self.line.extrapolator.num_classes, dtype=exact(device), device=device)
        return self.line.running_offset(step, self.ranks.total(new))

    def _realised(self, step: int) -> Tensor:
        counts = self.run.trainer.datamodule.step_counts(step, self.line.extrapolator.num_classes)
        return self.line.realised_offset(counts, self._device)
