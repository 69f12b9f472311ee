"""What LIMES tells of a run: to loggers, to whoever monitors a value, and on the report page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from groundwire import Finding, RunContext, Section, Variant, hookimpl
from groundwire_limes.kept import Kept
from groundwire_limes.report import findings_of, section


class Reported(Kept):
    """The part of :class:`groundwire_limes.LIMES` that reports."""

    _run: RunContext | None
    _omitted: bool
    _notes: list[tuple[str, str]]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The last complete step, for whoever monitors it."""
        self._log_last()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As at the end of an epoch: a checkpoint may be decided on here."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log_last()

    def _log_last(self) -> None:
        """What checkpoints and schedules can monitor; the loggers have every step already."""
        if self._run is not None and self._line is not None and self._line.closed:
            for name, value in self._line.measured(self._line.closed[-1]).items():
                self._run.log(name, value, logger=False, sync_dist=True)

    @hookimpl
    def gw_variants(self) -> list[Variant]:
        """The model without the correction, so that others can see what it does, and to whom."""
        return [] if self._correction is None else [Variant("without LIMES", self._without)]

    @contextmanager
    def _without(self) -> Iterator[None]:
        self._omitted = True
        try:
            yield
        finally:
            self._omitted = False

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Prequential quality, and what the reader should know."""
        if run.stage != "train" or self._line is None:
            return []
        self._absorb()
        return findings_of(self._line, self._season_steps, self._notes)

    @hookimpl
    def gw_section(self, findings: list[Finding], run: RunContext) -> Section | None:
        """Curves of accuracy, forecast and realised priors, and what the guard did."""
        return None if self._line is None else section(self, self._line, self._season_steps)
