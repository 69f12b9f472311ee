"""Where a stream is, what was observed of it, and the offsets that follow. Knows tensors, not Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from groundwire.errors import PluginError
from groundwire_limes.extrapolator import Forecast, PriorExtrapolator
from groundwire_limes.functional import FLOOR, LIMIT, Array, divergence, log_offset
from groundwire_limes.tally import Tally, exact

#: Labels that the forecast weighs against those that a step has shown so far.
STRENGTH = 100.0


@dataclass(frozen=True)
class Closed:
    """A step that is over: how good its forecast was.

    Attributes:
        step: Which one.
        divergence: Kullback-Leibler divergence of the forecast from the realised label frequencies, in nats.
        guarded: Whether the forecast was held near the long-run prior.
    """

    step: int
    divergence: float
    guarded: bool


class Expected(NamedTuple):
    """A forecast as tensors, kept for all batches of a step.

    Attributes:
        pseudo_counts: The forecast as counts of labels, and the labels that all ranks know of; (K,).
        log_prior: Logarithm of the forecast, (K,), float32.
    """

    pseudo_counts: Tensor
    log_prior: Tensor


class Timeline:
    """One stream.

    Args:
        extrapolator: Forecasts from what was observed.
        outputs: Scores that the head gives: K, or 1 for a binary one.
        lateness: Steps that a batch may be older than the newest one.
    """

    def __init__(self, extrapolator: PriorExtrapolator, outputs: int, lateness: int = 0) -> None:
        self.extrapolator = extrapolator
        self.tally = Tally(extrapolator.num_classes)
        self.current: int | None = None
        self.replaying = False
        self.closed: list[Closed] = []
        self._outputs = outputs
        self._lateness = lateness
        self._forecasts: dict[int, Forecast] = {}
        self._expected: dict[int, Expected] = {}
        self._made: dict[int, Forecast] = {}
        self._untold: dict[int, Array] = {}

    def replays(self, step: int) -> bool:
        """Whether ``step`` is older than the stream may be by now, or the stream did not come to new steps since."""
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

    def advance(self, step: int, gather: Callable[[Any], Iterable[Any]]) -> list[Closed]:
        """Go on to ``step``, which all ranks agreed on: steps before it are over.

        Returns:
            The steps that are over since the last call, oldest first.
        """
        if self.current is not None and step <= self.current:
            return []
        self.absorb(gather)
        self.current = step
        closed = [self._close(s) for s in sorted(self._made) if s < step and self.tally.counts(s).sum() > 0]
        # What batches that reach into a step expected of it before it was its turn is not what it is judged by.
        self._made = {s: f for s, f in self._made.items() if s > step}
        self._forecasts = {}
        self.closed += closed
        return closed

    def gather(self, gather: Callable[[Any], Iterable[Any]]) -> None:
        """Sum what the tally saw over all ranks. No forecast changes, so it may be saved at any batch."""
        for step, counts in self.tally.drain(gather).items():
            self._untold[step] = self._untold.get(step, 0.0) + counts
            self._expected = {}

    def absorb(self, gather: Callable[[Any], Iterable[Any]]) -> None:
        """Let the extrapolator know what the tally saw. It adds, so a step may come in parts."""
        self.gather(gather)
        self._tell()

    def _tell(self) -> None:
        for step, counts in sorted(self._untold.items()):
            if counts.any():  # a step without a label is missing, whatever the rule
                self.extrapolator.update(step, counts)
                self._forecasts = {s: f for s, f in self._forecasts.items() if s <= step}
        self._untold, self._expected = {}, {}

    def informed(self) -> Timeline:
        """For whoever asks between batches: itself, or a copy that knows the labels that were gathered since."""
        if not self._untold:
            return self
        twin = copy.deepcopy(self)
        twin._tell()
        return twin

    def _close(self, step: int) -> Closed:
        counts, forecast = self.tally.counts(step), self._made[step]
        return Closed(step, divergence(counts / counts.sum(), forecast.prior), forecast.guarded)

    def measured(self, closed: Closed) -> dict[str, float]:
        """Of a step that is over: ``accuracy`` (prequential), ``divergence``, and 0 or 1 in ``guarded``."""
        accuracy = {n: v for n, v in self.tally.quality(closed.step).items() if n == "accuracy"}
        return {**accuracy, "divergence": closed.divergence, "guarded": float(closed.guarded)}

    def forecast(self, step: int) -> Forecast:
        """What is expected of ``step``, from what was observed before it."""
        if step not in self._forecasts:
            self._forecasts[step] = self.extrapolator.explain(step)
        return self._forecasts[step]

    def expect(self, step: int) -> None:
        """Note that ``step`` is being learned from, so that its forecast is judged when it is over, and only once."""
        if self.current is None or step >= self.current:
            self._made.setdefault(step, self.forecast(step))

    def offset(self, step: int, device: Any = "cpu") -> Tensor:
        """What corrects the scores at ``step``: shape (K,), or (1,) for a binary head; float32."""
        return self.fitted(torch.as_tensor(log_offset(self.forecast(step).prior, self._limit), device=device))

    def running_offset(self, step: int, new: Tensor) -> Tensor:
        """As :meth:`offset`, from the forecast and the labels of ``step`` so far, as a Dirichlet posterior mean.

        In the dtype of ``new``: the head's buffer is float32, and writing to it converts.

        Args:
            step: The step.
            new: Its labels that are not known to all ranks yet, summed over them: shape (K,).
        """
        counts = self._expectation(step, new.device).pseudo_counts + new
        offset = counts.div_(counts.mean()).log_()  # of K times the share of each class
        return self._for_head(offset.clamp_(-self._limit, self._limit))

    def log_prior(self, step: int, device: Any = "cpu") -> Tensor:
        """Logarithm of the forecast, shape (K,), float32."""
        return self._expectation(step, device).log_prior

    def _expectation(self, step: int, device: Any) -> Expected:
        if step not in self._expected:
            prior, seen = np.maximum(self.forecast(step).prior, FLOOR), self.tally.counts(step)
            counts = torch.as_tensor(STRENGTH * prior + seen).to(device, exact(device))
            logs = torch.as_tensor(np.log(prior)).float().to(device)
            self._expected[step] = Expected(counts, logs)
        return self._expected[step]

    def realised_offset(self, counts: Array, device: Any = "cpu") -> Tensor:
        """As :meth:`offset`, from all labels that the step will have."""
        center = self.extrapolator.num_classes * [1 / self.extrapolator.num_classes]
        prior = (np.asarray(counts) + np.asarray(center)) / (np.sum(counts) + 1)
        return self.fitted(torch.as_tensor(log_offset(prior, self._limit), device=device))

    @property
    def _limit(self) -> float:
        return float("inf") if self.extrapolator.method == "nearest" else LIMIT

    def fitted(self, offset: Tensor) -> Tensor:
        """``offset`` (K,) as the head takes it, float32."""
        return self._for_head(offset).float()

    def _for_head(self, offset: Tensor) -> Tensor:
        return offset if self._outputs > 1 else offset[1:] - offset[:1]

    def state_dict(self) -> dict[str, Any]:
        """Everything that is known to all ranks, in plain types."""
        return {
            "extrapolator": self.extrapolator.state_dict(),
            "outputs": self._outputs,
            "current": self.current,
            "replaying": self.replaying,
            "known": {s: row.tolist() for s, row in self.tally.known.items()},
            "untold": {s: row.tolist() for s, row in self._untold.items()},
            "closed": [[c.step, c.divergence, c.guarded] for c in self.closed],
            "made": [[s, f.prior.tolist(), f.ahead, dict(f.weights), f.trust] for s, f in self._made.items()],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], extrapolator: PriorExtrapolator, lateness: int) -> Timeline:
        """Inverse of :meth:`state_dict`.

        Raises:
            PluginError: The state is of another kind of extrapolator.
        """
        try:
            extrapolator.load_state_dict(state["extrapolator"])
        except ValueError as error:
            raise PluginError(f"limes: {error}") from error
        line = cls(extrapolator, state["outputs"], lateness)
        line.current, line.replaying = state["current"], state["replaying"]
        line.tally.known = {int(s): np.array(row) for s, row in state["known"].items()}
        line._untold = {int(s): np.array(row) for s, row in state["untold"].items()}
        line.closed = [Closed(int(s), float(d), bool(g)) for s, d, g in state["closed"]]
        line._made = {int(s): Forecast(int(s), np.array(p), a, w, t) for s, p, a, w, t in state["made"]}
        return line
