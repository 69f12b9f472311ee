"""What LIMES keeps when a run is over: into checkpoints, and back from them."""

from __future__ import annotations

from typing import Any

from groundwire import PluginError
from groundwire_limes import inspection
from groundwire_limes.correction import Correction
from groundwire_limes.distributed import Ranks
from groundwire_limes.extrapolator import PriorExtrapolator
from groundwire_limes.forecasts import Forecasts
from groundwire_limes.learned import Learned


class Kept(Forecasts):
    """The part of :class:`groundwire_limes.LIMES` that checkpoints are about."""

    batches_per_step: int | None
    lateness: int
    unlabelled: bool
    _season_steps: int | None
    _ranks: Ranks
    _correction: Correction | None

    def _extrapolator(self, classes: int) -> PriorExtrapolator:
        if self.method == "seasonal" and self._season_steps is None:
            raise PluginError("limes: method='seasonal' needs a season of two steps or more -> season='1d'")
        return PriorExtrapolator(classes, method=self.method, period=self._season_steps)

    def _absorb(self) -> None:
        if self._line is not None:
            self._line.absorb(self._ranks.gather)

    def state_dict(self) -> dict[str, Any]:
        """Counts, quality, place in the stream; plain types. Under DDP all ranks call it, as they save together."""
        if self._line is None:
            return {}
        self._line.gather(self._ranks.gather)
        return self._learned.state_dict(self._arguments(), self.unlabelled)

    def _arguments(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "period": self._clock.seconds if self.batches_per_step is None else None,
            "batches_per_step": self.batches_per_step,
            "season": self._season_steps,
            "training_prior": self.training_prior,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved.

        Raises:
            PluginError: It was saved with other arguments, which are listed, or by a newer version.
        """
        if state_dict:
            self._learned = Learned.restored(state_dict, self._arguments(), self._extrapolator, self.lateness)
            self._correction = None

    def _restore_from(self, trainer: Any) -> None:
        """Lightning restores callbacks in ``fit`` only: a checkpoint would be predicted with uncorrected."""
        if self._line is None and trainer.ckpt_path:
            from groundwire.services.checkpoint.load import read

            self.load_state_dict(read(trainer.ckpt_path).get("callbacks", {}).get(self.state_key, {}))
        self._absorb()
        if self._line is None or not self._line.extrapolator.observed:
            inspection.say(inspection.NO_HISTORY)
