"""What versions of the model are compared with, and how, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire import PluginError, RunContext
from groundwire.ranks import gathered
from groundwire_bias_audit.gate import Gate
from groundwire_bias_audit.inputs import read_outputs
from groundwire_bias_audit.paired import Comparison
from groundwire_bias_audit.passes import Record, compared
from groundwire_bias_audit.result import AuditResult
from groundwire_bias_audit.stream import Stream

#: How the model itself is called among its versions.
DENSE = "dense"


def checked_baseline(baseline: Any) -> Any:
    """``BiasAudit(baseline=...)``: None, the name of a version (a sparsity is its name), or scores.

    Raises:
        TypeError: It is none of these.

    Example:
        >>> checked_baseline(0.5)
        '0.5'
    """
    if isinstance(baseline, int | float) and not isinstance(baseline, bool):
        return f"{float(baseline):g}"
    if baseline is not None and not isinstance(baseline, str) and np.ndim(baseline) == 0:
        raise TypeError(f"baseline must be a version's name, or scores by data set index, got {baseline!r}")
    return baseline


def counted_rows(run: RunContext, record: Record | None, threshold: float, max_groups: int) -> Stream:
    """The rows of all processes, added up."""
    stream = Stream(threshold, max_groups)
    if record is not None:
        stream.update(record.outputs, record.features)
    return stream.merged(lambda value: gathered(run.trainer, value))


def comparison(
    run: RunContext, first: Record | None, second: Record | None, dense: AuditResult, gate: Gate
) -> Comparison | None:
    """What changed from ``first`` to ``second`` in the rows of all processes; None for a regression: nothing flips."""
    if dense.task == "regression":
        return None
    groups = dense.evidence.groups
    own = None if first is None or second is None else compared(first, second, groups)
    found = [pair for pair in gathered(run.trainer, own) if pair is not None]
    names = ("",) if dense.task == "multiclass" else dense.targets
    pairs, flips = (sum(part[1:], part[0]) for part in zip(*found, strict=True))
    return Comparison(groups, names, pairs, flips, gate)


def reference_of(
    baseline: Any, records: Mapping[str, Record | None], threshold: float
) -> tuple[Record | None, str | None]:
    """The rows that versions are compared with, and whose they are."""
    if baseline is None:
        return records[DENSE], DENSE
    if isinstance(baseline, str):
        return records[baseline], baseline
    return _earlier(baseline, records[DENSE], threshold), None


def _earlier(baseline: Any, record: Record | None, threshold: float) -> Record | None:
    """The scores of an earlier model for the rows of ``record``."""
    if record is None:
        return None
    if record.ids is None:
        raise PluginError("a baseline by data set index needs such indices -> use a map-style data set")
    values = baseline.detach().cpu() if isinstance(baseline, Tensor) else torch.as_tensor(baseline)
    rows = record.sample_ids
    assert rows is not None
    if rows.max() >= len(values):
        raise PluginError(f"the baseline has {len(values)} rows, and the data set at least {rows.max() + 1}")
    task = record.outputs.task
    names = None if task == "binary" else record.outputs.names
    labels = record.outputs.labels if task != "binary" else record.outputs.labels[:, 0]
    outputs = read_outputs(labels, values.numpy()[rows], task=task, threshold=threshold, names=names)
    return Record(outputs, record.features, record.ids)
