"""What LIMES gives away once it observed a stream: priors, a table of biases, a model without the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from groundwire import Plugin, hookimpl
from groundwire_limes.clock import Clock
from groundwire_limes.correction import TrainingPrior
from groundwire_limes.export import BiasTable, bias_table, fold
from groundwire_limes.extrapolator import Method, PriorExtrapolator
from groundwire_limes.functional import Array
from groundwire_limes.learned import Learned
from groundwire_limes.timeline import Timeline


class Forecasts(Plugin):
    """The part of :class:`groundwire_limes.LIMES` that needs no run."""

    method: Method
    training_prior: TrainingPrior
    _clock: Clock
    _learned: Learned

    @property
    def _line(self) -> Timeline | None:
        return self._learned.line

    @property
    def extrapolator(self) -> PriorExtrapolator:
        """The forecaster with all that it observed.

        Raises:
            PluginError: Nothing was observed yet.
        """
        return self._learned.history().extrapolator

    @property
    def next_step(self) -> int:
        """The step after the newest one that has labels; 0 if there is none."""
        return self._learned.next_step

    def prior(self, timestamp: Any = None) -> Array:
        """The class prior expected at ``timestamp``, or in the step after the last one; shape (K,), float64."""
        step = self.next_step if timestamp is None else self._clock.steps(timestamp, 1).earliest
        return self.extrapolator.forecast(step)

    def export_adapted(self, timestamps: Sequence[Any], module: nn.Module | None = None) -> BiasTable:
        """Biases for serving without this plugin: what to add to the plain model's scores, step by step.

        Args:
            timestamps: When the model will be asked; each step in which one falls gives a row of the table. Step
                numbers with ``batches_per_step``.
            module: With the model, the table holds complete biases of its head.

        Raises:
            PluginError: Nothing was observed yet, or a timestamp is wrong.
        """
        line = self._learned.history()
        steps, length = self._clock.distinct(timestamps)
        head = None if module is None else module.get_submodule(self._learned.head or "")
        return bias_table(line, steps, length, head)

    @hookimpl
    def gw_export(self, module: nn.Module) -> None:
        """Fold the forecast of the step after the last one into the head's bias."""
        if self._line is not None and self._learned.head is not None:
            fold(module.get_submodule(self._learned.head), self._line.informed().offset(self.next_step))

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """What the weights need to be read right."""
        facts: dict[str, Any] = {
            "head": self._learned.head,
            "method": self.method,
            "training_prior": self.training_prior,
        }
        if self._line is not None:
            known = self._line.informed().extrapolator
            facts |= {"observed_steps": known.observed, "last_step": known.last_step}
        return facts
