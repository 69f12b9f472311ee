"""Recorder of a run's evaluation passes: the model's own, and that of each variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundwire import Fields, RunContext, Variant
from groundwire.distributed import gathered
from groundwire_bias_audit.audit.groups import joined
from groundwire_bias_audit.stream.logits import read_logits
from groundwire_bias_audit.stream.samples import Examples
from groundwire_bias_audit.stream.scored_rows import LOADER_STEP, ScoredRows, aligned
from groundwire_bias_audit.stream.sensitive_features import GroupReader
from groundwire_bias_audit.stream.streaming_counts import BUFFER, StreamingCounts, joined_outputs


def without_padding(sampler: Any, start: int, rows: int) -> NDArray[np.bool_] | None:
    """Mark those of ``rows`` rows, from position ``start`` of this process on, that are no repetition.

    torch's ``DistributedSampler`` (also Lightning's) appends rows until all processes have as many, and deals them out
    in turn: position i of process r is row i * world + r of that list.

    Args:
        sampler: The loader's sampler.
        start: Rows that this process saw before, in this pass and loader.
        rows: Rows of the batch.

    Returns:
        None if all count.

    Example:
        >>> from torch.utils.data import DistributedSampler
        >>> sampler = DistributedSampler(range(5), num_replicas=2, rank=1, shuffle=False)
        >>> list(sampler), without_padding(sampler, 0, 3).tolist()
        ([1, 3, 0], [True, True, False])
    """
    world, rank = getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)
    total, data = getattr(sampler, "total_size", None), getattr(sampler, "dataset", None)
    if world is None or rank is None or total is None or data is None or total <= len(data):
        return None
    keep = (start + np.arange(rows)) * world + rank < len(data)
    return None if keep.all() else keep


def loader_of(run: RunContext, number: int) -> Any:
    """A data loader of the running stage, as the Trainer prepared it."""
    return run.loaders()[number]


class EvaluationPass:
    """Takes the batches of one variant.

    Args:
        threshold: Predicted 1 where the probability is at least this.
        task: Kind of the task, or None to guess it from the first rows.
        max_groups: Most values of a feature.
        keep: Also keep the rows.
        count: Add the rows up, which needs their groups.
        resolved: Makes features of what was read from many batches.
    """

    def __init__(
        self,
        threshold: float,
        task: str | None,
        max_groups: int,
        *,
        keep: bool,
        count: bool = True,
        resolved: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        self.stream, self.examples = StreamingCounts(threshold, max_groups), Examples()
        self.keep, self.count, self.threshold, self.task, self._resolved = keep, count, threshold, task, resolved
        self._batches: list[tuple[Tensor, Any, Mapping[str, Any], Any]] = []
        self._rows = 0
        self._kept: list[ScoredRows] = []

    def add(self, scores: Tensor, targets: Any, features: Mapping[str, Any], ids: Any, keep: Any = None) -> None:
        """Take a batch; ``keep`` tells which rows count, None for all."""
        if keep is not None:
            rows = np.flatnonzero(keep)
            scores, targets = scores[rows], targets[rows]
            features = {name: joined([values])[rows] for name, values in features.items()}
            ids = None if ids is None else np.asarray(ids)[rows]
        self._batches.append((scores, targets, features, ids))
        self._rows += len(scores)
        if self._rows >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Count what is pending."""
        if not self._rows:
            self._batches = []
            return
        batches, self._batches, self._rows = self._batches, [], 0
        targets = [b[1] for b in batches]
        labels = (
            torch.cat(targets) if isinstance(targets[0], Tensor) else np.concatenate([np.asarray(t) for t in targets])
        )
        outputs = read_logits(torch.cat([b[0] for b in batches]), labels, self.threshold, self.task)
        self.task = outputs.task
        features = self._resolved({name: joined([b[2][name] for b in batches]) for name in batches[0][2]})
        ids = None if any(b[3] is None for b in batches) else np.concatenate([b[3] for b in batches])
        if self.count:
            self.stream.update(outputs, features)
            if ids is not None:
                self.examples.update(outputs, features, ids)
        if self.keep:
            self._kept.append(ScoredRows(outputs, {name: values.tolist() for name, values in features.items()}, ids))

    def scored_rows(self) -> ScoredRows | None:
        """The rows that were kept, or None without any."""
        self.flush()
        if not self._kept:
            return None
        names = self._kept[0].features
        ids = [r.ids for r in self._kept if r.ids is not None]
        return ScoredRows(
            joined_outputs([r.outputs for r in self._kept]),
            {name: [v for r in self._kept for v in r.features[name]] for name in names},
            np.concatenate(ids) if len(ids) == len(self._kept) else None,
        )


class Recorder:
    """The pass that is going on.

    Args:
        reader: Reads the groups of a batch.
        threshold: Predicted 1 where P(y=1) is at least this.
        task: Kind of the task, or None to guess it.
        max_groups: Most values of a feature.

    Attributes:
        dense: The model's own pass, from its start until :meth:`forget`.
    """

    def __init__(self, reader: GroupReader, threshold: float, task: str | None, max_groups: int) -> None:
        self.reader, self.threshold, self.task, self.max_groups = reader, threshold, task, max_groups
        self.forget()

    def forget(self) -> None:
        """Let go of all rows."""
        self.dense: EvaluationPass | None = None
        self._variant: tuple[str, EvaluationPass] | None = None
        self._loaders: list[int] = []
        self._position: dict[int, int] = {}
        self._sources: dict[int, Any] = {}
        self._loader = self._cursor = 0
        self._batch: Any = None

    def begin(self, *, keep: bool) -> None:
        """A pass of the model itself; ``keep`` its rows to compare others with."""
        self._loaders, self._position, self._sources = [], {}, {}
        self.dense = EvaluationPass(
            self.threshold, self.task, self.max_groups, keep=keep, resolved=self.reader.resolved
        )

    def batch_starts(self, batch: Any, loader: int) -> None:
        """Remember the batch that the next scores are for, and its loader."""
        self._batch, self._loader = batch, loader

    def features(self, fields: Fields, run: RunContext) -> dict[str, Any]:
        """The groups of the rows of the batch that started."""
        rows = None if run.ids is None else np.asarray(run.ids)
        return self._read(fields, rows, loader_of(run, self._loader))

    def _read(self, fields: Fields, rows: Any, loader: Any) -> dict[str, Any]:
        return self.reader.read(self._batch, fields, rows, getattr(loader, "dataset", None))

    def take(self, scores: Tensor, fields: Fields, variant: str | None, run: RunContext) -> None:
        """The scores of a batch, of the model or of the variant that :meth:`evaluate` is at."""
        if variant is None and self.dense is not None:
            self._loaders.append(self._loader)
            self._add(self.dense, scores, fields, self._loader, run)
            self._batch = None
        elif self._variant is not None and variant == self._variant[0]:
            # Variants see the batches in the order in which the model saw them.
            loader = self._loaders[self._cursor]
            self._cursor += 1
            self._add(self._variant[1], scores, fields, loader, run)

    def _add(self, target: EvaluationPass, scores: Tensor, fields: Fields, loader: int, run: RunContext) -> None:
        start = self._position.get(loader, 0)
        self._position[loader] = start + len(scores)
        source = self._sources.get(loader)
        if source is None:
            source = self._sources[loader] = loader_of(run, loader)
        given = run.ids
        rows = None if given is None else np.asarray(given)
        ids = None if rows is None or len(rows) != len(scores) else rows + loader * LOADER_STEP
        # A variant's rows are the model's, so they have the groups of those.
        features = self._read(fields, rows, source) if target.count else {}
        keep = without_padding(getattr(source, "sampler", None), start, len(scores))
        target.add(scores, fields.targets, features, ids, keep)

    def evaluate(self, run: RunContext, variant: Variant, rows: ScoredRows | None) -> tuple[bool, ScoredRows | None]:
        """One more pass for a variant.

        Returns:
            Whether its rows could be matched with the model's on all processes; and this process's, in the order of
            ``rows`` and with its groups.
        """
        taken = EvaluationPass(self.threshold, self.task, self.max_groups, keep=True, count=False)
        self._variant, self._cursor, self._position = (variant.name, taken), 0, {}
        try:
            run.evaluate(variant)
        finally:
            self._variant = None
        own = taken.scored_rows()
        if own is not None and rows is not None:
            own = aligned(rows, own)
        good = (own is None) == (rows is None)
        if own is not None and rows is not None:
            own = replace(own, features=rows.features, ids=rows.ids)
        return all(gathered(run.trainer, good)), own
