"""Progress of a stream: the time step that it is at, the labels observed, and the offsets that follow.

Knows tensors, not Lightning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from groundwire.errors import PluginError
from groundwire_limes.class_counts import ClassCounts, Predictions, accumulation_dtype
from groundwire_limes.extrapolator import Forecast, PriorExtrapolator
from groundwire_limes.functional import FLOOR, LIMIT, Array, kl_divergence, log_offset
from groundwire_limes.labels import Labels
from groundwire_limes.time_steps import BatchSteps

#: Labels that the forecast weighs against those that a step has shown so far.
STRENGTH = 100.0

AllGather = Callable[[Any], Iterable[Any]]


@dataclass(frozen=True)
class FinishedStep:
    """A time step that is over: how good its forecast was.

    Attributes:
        step: Which one.
        divergence: Kullback-Leibler divergence of the forecast from the realised label frequencies, in nats.
        guarded: Whether the forecast was held near the long-run prior.
    """

    step: int
    divergence: float
    guarded: bool


class ForecastTensors(NamedTuple):
    """A forecast as tensors, kept for all batches of a step.

    Attributes:
        pseudo_counts: The forecast as counts of labels, and the labels that all ranks know of; (K,).
        log_prior: Logarithm of the forecast, (K,), float32.
    """

    pseudo_counts: Tensor
    log_prior: Tensor


class PriorTracker:
    """The class prior of one stream: forecast, then counted, step by step.

    Args:
        extrapolator: Forecasts from what was observed.
        outputs: Scores that the head gives: K, or 1 for a binary one.
        lateness: Steps that a batch may be older than the newest one.

    Attributes:
        class_counts: Labels and quality by step.
        current: The newest step; None before the first.
        replaying: Whether the stream went back, and did not come to new steps since.
        finished: Steps that are over, oldest first.
    """

    def __init__(self, extrapolator: PriorExtrapolator, outputs: int, lateness: int = 0) -> None:
        self.extrapolator = extrapolator
        self.class_counts = ClassCounts(extrapolator.num_classes)
        self.current: int | None = None
        self.replaying = False
        self.finished: list[FinishedStep] = []
        self._outputs = outputs
        self._lateness = lateness
        self._forecasts: dict[int, Forecast] = {}
        self._tensors: dict[int, ForecastTensors] = {}
        self._awaiting_labels: dict[int, Forecast] = {}
        self._unabsorbed: dict[int, Array] = {}

    # Going on in time

    def replays(self, step: int) -> bool:
        """Tell whether ``step`` is older than the stream may be by now, or no new step came since one was."""
        if self.current is not None:
            back = step < self.current - self._lateness
            self.replaying = back or (self.replaying and step <= self.current)
        return self.replaying

    def refuse(self, step: int) -> NoReturn:
        """Say that time went backwards.

        Raises:
            PluginError: Always.
        """
        current = self.current or 0
        raise PluginError(
            f"limes: time goes backwards, from step {current} to {step}: a stream that is over began again "
            "(max_epochs=1 stops there), a shuffled loader, or rows out of order -> give data in the order of time "
            f"(StreamDataModule), allow lateness={current - step} steps, or train without counting: "
            "on_backward='replay'"
        )

    def advance(self, step: int, all_gather: AllGather) -> list[FinishedStep]:
        """Go on to ``step``, which all ranks agreed on: steps before it are over.

        Returns:
            The steps that are over since the last call, oldest first.
        """
        if self.current is not None and step <= self.current:
            return []
        self.absorb(all_gather)
        self.current = step
        over = sorted(s for s in self._awaiting_labels if s < step)
        finished = [self._finished(s) for s in over if self.class_counts.counts(s).sum() > 0]
        # What batches that reach into a step expected of it before it was its turn is not what it is judged by.
        self._awaiting_labels = {s: f for s, f in self._awaiting_labels.items() if s > step}
        self._forecasts = {}
        self.finished += finished
        return finished

    def _finished(self, step: int) -> FinishedStep:
        counts, forecast = self.class_counts.counts(step), self._awaiting_labels[step]
        return FinishedStep(step, kl_divergence(counts / counts.sum(), forecast.prior), forecast.guarded)

    def metrics(self, finished: FinishedStep) -> dict[str, float]:
        """Return of a step that is over ``accuracy`` (prequential), ``divergence``, and 0 or 1 in ``guarded``."""
        quality = self.class_counts.quality(finished.step)
        accuracy = {name: value for name, value in quality.items() if name == "accuracy"}
        return {**accuracy, "divergence": finished.divergence, "guarded": float(finished.guarded)}

    # Observing labels

    def count(self, steps: BatchSteps, scores: Tensor, labels: Labels, weights: Tensor) -> None:
        """Add the labels and the quality of a batch's predictions to the steps that they belong to.

        Args:
            steps: Of the batch's B rows.
            scores: Raw scores (N, K), float32; N is B, or B times the places of a row.
            labels: Of the N predictions.
            weights: Of the N predictions.
        """
        for step in steps.distinct:
            self.judge_later(step)
            offset = self._forecast_tensors(step, scores.device).log_prior
            predictions = Predictions(scores, offset, labels, weights)
            if not isinstance(steps.keys, int):
                predictions = predictions.rows(torch.tensor(steps.mask(step, len(scores)), device=scores.device))
            self.class_counts.add(step, predictions)

    def judge_later(self, step: int) -> None:
        """Note that ``step`` is being learned from, so that its forecast is judged when it is over, and only once."""
        if self.current is None or step >= self.current:
            self._awaiting_labels.setdefault(step, self.forecast(step))

    def gather(self, all_gather: AllGather) -> None:
        """Sum what was counted over all ranks. No forecast changes, so it may be saved at any batch."""
        for step, counts in self.class_counts.gather(all_gather).items():
            self._unabsorbed[step] = self._unabsorbed.get(step, 0.0) + counts
            self._tensors = {}

    def absorb(self, all_gather: AllGather) -> None:
        """Let the extrapolator know what was counted. It adds, so a step may come in parts."""
        self.gather(all_gather)
        self._update_extrapolator()

    def _update_extrapolator(self) -> None:
        for step, counts in sorted(self._unabsorbed.items()):
            if counts.any():  # a step without a label is missing, whatever the rule
                self.extrapolator.update(step, counts)
                self._forecasts = {s: f for s, f in self._forecasts.items() if s <= step}
        self._unabsorbed, self._tensors = {}, {}

    def up_to_date(self) -> PriorTracker:
        """Return, for whoever asks between batches, itself or a copy that absorbed the labels gathered since."""
        if not self._unabsorbed:
            return self
        twin = copy.deepcopy(self)
        twin._update_extrapolator()
        return twin

    # Forecasts and offsets

    def forecast(self, step: int) -> Forecast:
        """Return what is expected of ``step``, from what was observed before it."""
        if step not in self._forecasts:
            self._forecasts[step] = self.extrapolator.explain(step)
        return self._forecasts[step]

    def offset(self, step: int, device: Any = "cpu") -> Tensor:
        """Return the offset of the scores at ``step``: shape (K,), or (1,) for a binary head; float32."""
        return self.offset_of(self.forecast(step).prior, device)

    def offset_of(self, prior: Array, device: Any = "cpu") -> Tensor:
        """Return the offset of the scores for a ``prior`` (K,), as the head takes it; float32."""
        return self._for_head(torch.as_tensor(log_offset(prior, self._limit), device=device)).float()

    def running_offset(self, step: int, new: Tensor) -> Tensor:
        """Return the offset for the forecast and the labels of ``step`` so far: their Dirichlet posterior mean.

        In the dtype of ``new``: the hook on the head makes it float32.

        Args:
            step: The step.
            new: Its labels that are not known to all ranks yet, summed over them: shape (K,).
        """
        counts = self._forecast_tensors(step, new.device).pseudo_counts + new
        offset = counts.div_(counts.mean()).log_()  # of K times the share of each class
        return self._for_head(offset.clamp_(-self._limit, self._limit))

    def new_labels(self, step: int, device: torch.device) -> Tensor:
        """Return this rank's label counts of ``step`` that are not known to all ranks yet; shape (K,)."""
        found = self.class_counts.pending(step)
        if found is not None:
            return found
        return torch.zeros(self.extrapolator.num_classes, dtype=accumulation_dtype(device), device=device)

    def realised_offset(self, counts: Array, device: Any = "cpu") -> Tensor:
        """Return the offset for all ``counts`` (K,) that a step will have."""
        return self.offset_of((np.asarray(counts) + 1 / self.extrapolator.num_classes) / (np.sum(counts) + 1), device)

    def _forecast_tensors(self, step: int, device: Any) -> ForecastTensors:
        if step not in self._tensors:
            prior, seen = np.maximum(self.forecast(step).prior, FLOOR), self.class_counts.counts(step)
            counts = torch.as_tensor(STRENGTH * prior + seen).to(device, accumulation_dtype(device))
            self._tensors[step] = ForecastTensors(counts, torch.as_tensor(np.log(prior)).float().to(device))
        return self._tensors[step]

    @property
    def _limit(self) -> float:
        return float("inf") if self.extrapolator.method == "nearest" else LIMIT

    def _for_head(self, offset: Tensor) -> Tensor:
        return offset if self._outputs > 1 else offset[1:] - offset[:1]

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is known to all ranks, in plain types."""
        awaiting = self._awaiting_labels.items()
        return {
            "extrapolator": self.extrapolator.state_dict(),
            "outputs": self._outputs,
            "current": self.current,
            "replaying": self.replaying,
            "known": {s: row.tolist() for s, row in self.class_counts.known.items()},
            "untold": {s: row.tolist() for s, row in self._unabsorbed.items()},
            "closed": [[f.step, f.divergence, f.guarded] for f in self.finished],
            "made": [[s, f.prior.tolist(), f.ahead, dict(f.weights), f.trust] for s, f in awaiting],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], extrapolator: PriorExtrapolator, lateness: int) -> PriorTracker:
        """Return the tracker whose :meth:`state_dict` is ``state``.

        Raises:
            PluginError: The state is of another kind of extrapolator.
        """
        try:
            extrapolator.load_state_dict(state["extrapolator"])
        except ValueError as error:
            raise PluginError(f"limes: {error}") from error
        tracker = cls(extrapolator, state["outputs"], lateness)
        tracker.current, tracker.replaying = state["current"], state["replaying"]
        tracker.class_counts.known = {int(s): np.array(row) for s, row in state["known"].items()}
        tracker._unabsorbed = {int(s): np.array(row) for s, row in state["untold"].items()}
        tracker.finished = [FinishedStep(int(s), float(d), bool(g)) for s, d, g in state["closed"]]
        tracker._awaiting_labels = {int(s): Forecast(int(s), np.array(p), a, w, t) for s, p, a, w, t in state["made"]}
        return tracker
