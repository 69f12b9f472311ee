"""Variants of the model: pruned ones where nobody offers any, their evaluation, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from groundwire import PluginError, RunContext, Variant
from groundwire.distributed import gathered
from groundwire_bias_audit.audit.change import Comparison
from groundwire_bias_audit.audit.gate import Gate
from groundwire_bias_audit.audit.predictions import read_outputs
from groundwire_bias_audit.audit.record import AuditRecord
from groundwire_bias_audit.stream.recorder import Recorder
from groundwire_bias_audit.stream.scored_rows import ScoredRows, paired_counts
from groundwire_bias_audit.stream.streaming_counts import StreamingCounts


def checked_variants(variants: Any) -> bool | tuple[float | Variant, ...]:
    """``BiasAudit(variants=...)``: True, False, or a list of sparsities and :class:`groundwire.Variant`.

    Raises:
        ValueError: An entry is neither, or a sparsity is outside (0, 1).

    Example:
        >>> checked_variants([0.5, 0.9])
        (0.5, 0.9)
    """
    if isinstance(variants, bool):
        return variants
    entries = [variants] if isinstance(variants, Real | Variant) else list(variants)
    for entry in entries:
        if isinstance(entry, Variant):
            continue
        if isinstance(entry, bool) or not isinstance(entry, Real) or not 0 < float(entry) < 1:
            raise ValueError(f"variants must hold sparsities in (0, 1) or Variant objects, got {entry!r}")
    return tuple(entry if isinstance(entry, Variant) else float(entry) for entry in entries)


def requested(module: nn.Module, entries: Sequence[float | Variant]) -> list[Variant]:
    """The user's own list, sparsities as magnitude-pruned variants of ``module``."""
    return [e if isinstance(e, Variant) else Variant(f"{e:g}", partial(pruned, module, e)) for e in entries]


@contextmanager
def pruned(module: nn.Module, sparsity: float) -> Iterator[nn.Module]:
    """``module`` with its smallest weights set to zero while open; the weights are put back, whatever happens.

    Global unstructured L1 pruning by ``torch.nn.utils.prune`` over all parameters of more than one dimension.
    BatchNorm statistics stay those of the dense model.

    Args:
        module: Any module.
        sparsity: Share of those weights to prune.

    Raises:
        PluginError: ``module`` has no such parameter.

    Example:
        >>> layer = nn.Linear(4, 5)
        >>> with pruned(layer, 0.5):
        ...     int((layer.weight == 0).sum())
        10
        >>> int((layer.weight == 0).sum())
        0
    """
    weights = [p for p in module.parameters() if p.dim() > 1]
    if not weights:
        raise PluginError(f"{type(module).__name__} has no weight of more than one dimension to prune")
    saved = [p.detach().clone() for p in weights]
    try:
        with torch.no_grad():
            # torch prunes attributes of modules; one that only holds the magnitudes leaves the model's own untouched.
            flat = torch.cat([p.detach().abs().flatten() for p in weights])
            mask = prune.L1Unstructured(sparsity).compute_mask(flat, torch.ones_like(flat))  # type: ignore[no-untyped-call]
            for p, part in zip(weights, mask.split([p.numel() for p in weights]), strict=True):
                p.mul_(part.view_as(p))
        yield module
    finally:
        with torch.no_grad():
            for p, values in zip(weights, saved, strict=True):
                p.copy_(values)


#: How the model itself is called among its variants.
DENSE = "dense"


def checked_baseline(baseline: Any) -> Any:
    """``BiasAudit(baseline=...)``: None, the name of a variant (a sparsity is its name), or scores.

    Raises:
        TypeError: It is none of these.

    Example:
        >>> checked_baseline(0.5)
        '0.5'
    """
    if isinstance(baseline, int | float) and not isinstance(baseline, bool):
        return f"{float(baseline):g}"
    if baseline is not None and not isinstance(baseline, str) and np.ndim(baseline) == 0:
        raise TypeError(f"baseline must be a variant's name, or scores by data set index, got {baseline!r}")
    return baseline


def counted_rows(run: RunContext, rows: ScoredRows | None, threshold: float, max_groups: int) -> StreamingCounts:
    """The rows of all processes, added up."""
    stream = StreamingCounts(threshold, max_groups)
    if rows is not None:
        stream.update(rows.outputs, rows.features)
    return stream.merged(lambda value: gathered(run.trainer, value))


def comparison(
    run: RunContext, first: ScoredRows | None, second: ScoredRows | None, dense: AuditRecord, gate: Gate
) -> Comparison | None:
    """Compare ``first`` and ``second`` in the rows of all processes; None for a regression: nothing flips."""
    if dense.task == "regression":
        return None
    groups = dense.counts.groups
    own = None if first is None or second is None else paired_counts(first, second, groups)
    found = [pair for pair in gathered(run.trainer, own) if pair is not None]
    names = ("",) if dense.task == "multiclass" else dense.targets
    pairs, flips = (sum(part[1:], part[0]) for part in zip(*found, strict=True))
    return Comparison(groups, names, pairs, flips, gate)


def reference_of(
    baseline: Any, rows_by_variant: Mapping[str, ScoredRows | None], threshold: float
) -> tuple[ScoredRows | None, str | None]:
    """The rows that variants are compared with, and whose they are."""
    if baseline is None:
        return rows_by_variant[DENSE], DENSE
    if isinstance(baseline, str):
        return rows_by_variant[baseline], baseline
    return _earlier(baseline, rows_by_variant[DENSE], threshold), None


def _earlier(baseline: Any, rows: ScoredRows | None, threshold: float) -> ScoredRows | None:
    """The scores of an earlier model for the rows of ``rows``."""
    if rows is None:
        return None
    if rows.ids is None:
        raise PluginError("a baseline by data set index needs such indices -> use a map-style data set")
    values = baseline.detach().cpu() if isinstance(baseline, Tensor) else torch.as_tensor(baseline)
    ids = rows.sample_ids
    assert ids is not None
    if ids.max() >= len(values):
        raise PluginError(f"the baseline has {len(values)} rows, and the data set at least {ids.max() + 1}")
    task = rows.outputs.task
    names = None if task == "binary" else rows.outputs.names
    labels = rows.outputs.labels if task != "binary" else rows.outputs.labels[:, 0]
    outputs = read_outputs(labels, values.numpy()[ids], task=task, threshold=threshold, names=names)
    return ScoredRows(outputs, rows.features, rows.ids)


@dataclass
class VariantPasses:
    """The rows and sums of the model and of each variant of it that could be matched with it.

    Attributes:
        rows_by_variant: This process's rows by variant.
        streams: Sums of all processes by variant.
    """

    rows_by_variant: dict[str, ScoredRows | None]
    streams: dict[str, StreamingCounts]

    def add(self, run: RunContext, variant: Variant, recorder: Recorder) -> bool:
        """Evaluate a variant; False if its rows could not be matched with the model's.

        Raises:
            PluginError: There is a variant of that name.
        """
        if variant.name in self.rows_by_variant:
            raise PluginError(f"two variants of the model are called {variant.name!r} -> rename one")
        matched, own = recorder.evaluate(run, variant, self.rows_by_variant[DENSE])
        if matched:
            self.rows_by_variant[variant.name] = own
            self.streams[variant.name] = counted_rows(run, own, recorder.threshold, recorder.max_groups)
        return matched

    def changes(
        self, run: RunContext, baseline: Any, threshold: float, dense: AuditRecord, gate: Gate
    ) -> tuple[dict[str, Comparison | None], ScoredRows | None]:
        """Compare each variant with the baseline; also return the baseline's rows of this process.

        Nothing for a regression, which has no flips: its variants are audited by themselves.
        """
        if dense.task == "regression":
            if baseline is not None:
                raise PluginError("a baseline is compared by flips, which a regression has not -> leave baseline= out")
            return dict.fromkeys(self.rows_by_variant), None
        reference, against = reference_of(baseline, self.rows_by_variant, threshold)
        found = {
            name: None if name == against else comparison(run, reference, rows, dense, gate)
            for name, rows in self.rows_by_variant.items()
        }
        return found, reference
