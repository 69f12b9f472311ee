"""Other versions of the model: each evaluated once, compared with the baseline, and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundwire import Finding, PluginError, RunContext, Variant
from groundwire.ranks import gathered
from groundwire_bias_audit.baseline import DENSE, comparison, counted_rows, reference_of
from groundwire_bias_audit.explained import NO_FLIP, NO_INDEX, Pairs, explain
from groundwire_bias_audit.flips import column_of
from groundwire_bias_audit.gate import Gate
from groundwire_bias_audit.lists import drawn_flips
from groundwire_bias_audit.paired import Comparison
from groundwire_bias_audit.passes import Record
from groundwire_bias_audit.recorder import Recorder
from groundwire_bias_audit.result import AuditResult
from groundwire_bias_audit.samples import Samples
from groundwire_bias_audit.stream import Stream


@dataclass
class Versions:
    """The rows and sums of the model and of each version of it that could be matched with it.

    Attributes:
        records: This process's rows by version.
        streams: Sums of all processes by version.
    """

    records: dict[str, Record | None]
    streams: dict[str, Stream]

    def add(self, run: RunContext, variant: Variant, recorder: Recorder) -> bool:
        """Evaluate a version; False if its rows could not be matched with the model's.

        Raises:
            PluginError: There is a version of that name.
        """
        if variant.name in self.records:
            raise PluginError(f"two versions of the model are called {variant.name!r} -> rename one")
        matched, own = recorder.evaluate(run, variant, self.records[DENSE])
        if matched:
            self.records[variant.name] = own
            self.streams[variant.name] = counted_rows(run, own, recorder.threshold, recorder.max_groups)
        return matched

    def changes(
        self, run: RunContext, baseline: Any, threshold: float, dense: AuditResult, gate: Gate
    ) -> tuple[dict[str, Comparison | None], Record | None]:
        """What changed from the baseline to each version, and the baseline's rows of this process.

        Nothing for a regression, which has no flips: its versions are audited by themselves.
        """
        if dense.task == "regression":
            if baseline is not None:
                raise PluginError("a baseline is compared by flips, which a regression has not -> leave baseline= out")
            return dict.fromkeys(self.records), None
        reference, against = reference_of(baseline, self.records, threshold)
        found = {
            name: None if name == against else comparison(run, reference, record, dense, gate)
            for name, record in self.records.items()
        }
        return found, reference


def unmatched(plugin: str, version: str) -> Finding:
    """Rows of a version that are not the model's."""
    text = f"The rows of {version} could not be matched with the model's, so it was not audited."
    return Finding(plugin, f"unmatched@{version}", "warn", version, text)


def explain_versions(
    run: RunContext,
    variants: Sequence[Variant],
    records: Mapping[str, Record | None],
    features: Sequence[str],
    samples: Samples,
    *,
    method: str,
    per_group: int,
    null: Sequence[Path],
) -> dict[str, Pairs | str]:
    """Attribution pairs of each version; samples are drawn from the rows of all processes.

    Returns:
        The same reasons on all processes; pairs themselves on the first one, which alone computes them.
    """
    found: dict[str, Pairs | str] = {}
    dense = records[DENSE]
    known = all(gathered(run.trainer, dense is None or dense.ids is not None))
    for variant in variants:
        if variant.name not in records:
            continue
        flips = drawn_flips(run.trainer, dense, records[variant.name], features, per_group) if known else None
        if flips is None:
            found[variant.name] = NO_FLIP if known else NO_INDEX
        elif run.trainer.is_global_zero:
            columns = {name: flips[column_of(name)] for name in features}
            found[variant.name] = explain(run.module, variant, flips, columns, samples, method=method, null=null)
    return found
