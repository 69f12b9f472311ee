"""How labels and groups go together in the training data, for bias amplification."""

from __future__ import annotations

from typing import Any

import numpy as np

from groundwire import PluginError
from groundwire_bias_audit.attributes import GroupReader
from groundwire_bias_audit.encoding import joined


class TrainingCounts:
    """Counts of groups and binary labels over the first training epoch, where batches carry groups.

    Only this process's batches: under DDP they are a random share of the data, enough for a frequency.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[dict[str, Any], Any]] = []
        self.counts: dict[tuple[str, Any], Any] = {}
        self._readable = True

    def take(self, reader: GroupReader, batch: Any, run: Any) -> None:
        """Add a training batch, if its groups can be read from it alone."""
        if not self._readable:
            return
        try:
            fields = run.fields(batch)
            features = reader(batch, fields, None, None)
        except PluginError:
            self._readable = False  # the audited labels serve instead
            return
        if fields.targets is not None:
            self._pending.append((features, fields.targets))

    def of(self, feature: str, level: Any) -> Any:
        """``[value, label]`` for "the feature is ``level``", summed over targets' rows; None where unknown.

        Returns:
            Shape (T, 2, 2), value 1 where the row is in the group.
        """
        self._count()
        totals = [value for (name, _), value in self.counts.items() if name == feature]
        if not totals or (feature, level) not in self.counts:
            return None
        inside = self.counts[feature, level]
        return np.stack([sum(totals) - inside, inside], axis=1)

    def _count(self) -> None:
        pending, self._pending = self._pending, []
        for features, targets in pending:
            labels = np.asarray(targets.detach().cpu() if hasattr(targets, "detach") else targets)
            labels = labels[:, None] if labels.ndim == 1 else labels
            if not np.isin(labels, (0, 1)).all():
                return
            for name, values in features.items():
                column = joined([values])
                for level in set(column.tolist()):
                    held = labels[column == level]
                    counts = np.stack([(held == 0).sum(axis=0), (held == 1).sum(axis=0)], axis=1)
                    self.counts[name, level] = self.counts.get((name, level), 0) + counts
