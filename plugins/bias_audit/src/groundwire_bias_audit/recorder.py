"""Takes the rows of a run's evaluation passes: the model's own, and that of each other version."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from groundwire import Fields, RunContext, Variant
from groundwire.ranks import gathered
from groundwire_bias_audit.attributes import GroupReader
from groundwire_bias_audit.loaders import loader_of
from groundwire_bias_audit.padding import counted
from groundwire_bias_audit.passes import LOADER_STEP, Pass, Record, aligned


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
        self.dense: Pass | None = None
        self._version: tuple[str, Pass] | None = None
        self._loaders: list[int] = []
        self._position: dict[int, int] = {}
        self._sources: dict[int, Any] = {}
        self._loader = self._cursor = 0
        self._batch: Any = None

    def begin(self, *, keep: bool) -> None:
        """A pass of the model itself; ``keep`` its rows to compare others with."""
        self._loaders, self._position, self._sources = [], {}, {}
        self.dense = Pass(self.threshold, self.task, self.max_groups, keep=keep, resolved=self.reader.resolved)

    def batch_starts(self, batch: Any, loader: int) -> None:
        """Which batch the next scores are for, and of which loader."""
        self._batch, self._loader = batch, loader

    def features(self, fields: Fields, run: RunContext) -> dict[str, Any]:
        """The groups of the rows of the batch that started."""
        rows = None if run.ids is None else np.asarray(run.ids)
        return self._read(fields, rows, loader_of(run, self._loader))

    def _read(self, fields: Fields, rows: Any, loader: Any) -> dict[str, Any]:
        return self.reader.read(self._batch, fields, rows, getattr(loader, "dataset", None))

    def take(self, scores: Tensor, fields: Fields, variant: str | None, run: RunContext) -> None:
        """The scores of a batch, of the model or of the version that :meth:`evaluate` is at."""
        if variant is None and self.dense is not None:
            self._loaders.append(self._loader)
            self._add(self.dense, scores, fields, self._loader, run)
            self._batch = None
        elif self._version is not None and variant == self._version[0]:
            # Versions see the batches in the order in which the model saw them.
            loader = self._loaders[self._cursor]
            self._cursor += 1
            self._add(self._version[1], scores, fields, loader, run)

    def _add(self, target: Pass, scores: Tensor, fields: Fields, loader: int, run: RunContext) -> None:
        start = self._position.get(loader, 0)
        self._position[loader] = start + len(scores)
        source = self._sources.get(loader)
        if source is None:
            source = self._sources[loader] = loader_of(run, loader)
        given = run.ids
        rows = None if given is None else np.asarray(given)
        ids = None if rows is None or len(rows) != len(scores) else rows + loader * LOADER_STEP
        # A version's rows are the model's, so they have the groups of those.
        features = self._read(fields, rows, source) if target.count else {}
        keep = counted(getattr(source, "sampler", None), start, len(scores))
        target.add(scores, fields.targets, features, ids, keep)

    def evaluate(self, run: RunContext, variant: Variant, record: Record | None) -> tuple[bool, Record | None]:
        """One more pass for a version.

        Returns:
            Whether its rows could be matched with the model's on all processes; and this process's, in the order of
            ``record`` and with its groups.
        """
        taken = Pass(self.threshold, self.task, self.max_groups, keep=True, count=False)
        self._version, self._cursor, self._position = (variant.name, taken), 0, {}
        try:
            run.evaluate(variant)
        finally:
            self._version = None
        own = taken.record()
        if own is not None and record is not None:
            own = aligned(record, own)
        good = (own is None) == (record is None)
        if own is not None and record is not None:
            own = replace(own, features=record.features, ids=record.ids)
        return all(gathered(run.trainer, good)), own
