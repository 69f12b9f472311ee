"""Result of an audit: its record, and the ways to take it elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.record import AuditRecord
from groundwire_bias_audit.output.export import to_csv, to_json
from groundwire_bias_audit.output.page import to_html


@dataclass(frozen=True)
class AuditResult(AuditRecord):
    """The outcome of :func:`groundwire_bias_audit.audit`: an :class:`AuditRecord` that can be printed and exported.

    Attributes:
        counts: Sums by group.
        gate: When a gap is a disparity.
        comparison: What changed from the baseline, if there is one.
        metrics: Columns to show; None for all of the task.
        n_boot: Bootstrap draws.
        ci_quantiles: Of the intervals.
        random_state: Seed of bootstrap and permutations.
        meta: Facts about the audited data and model, for the reports.
    """

    @property
    def evidence(self) -> GroupCounts:
        """Deprecated name of :attr:`counts`."""
        warnings.warn("AuditResult.evidence is called counts now", DeprecationWarning, stacklevel=2)
        return self.counts

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as JSON with a schema version; undefined numbers are null."""
        return to_json(self, path)

    def to_html(self, path: str | Path | None = None) -> str:
        """Return one page that needs no network and no script; all names are escaped."""
        return to_html(self, path)

    def to_csv(self, path: str | Path | None = None, features: str | Sequence[str] | None = None) -> str:
        """Return :meth:`to_frame` as CSV; what a spreadsheet would take for a formula gets an apostrophe in front."""
        return to_csv(self.to_frame(features), path)

    def __str__(self) -> str:
        return f"{self.title}: {self.verdict}\n  {self.conclusion}"
