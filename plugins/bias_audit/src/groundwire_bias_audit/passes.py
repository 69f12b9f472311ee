"""One evaluation pass of one version of the model: added up and, where versions are compared, kept by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundwire_bias_audit.capture import outputs_of
from groundwire_bias_audit.encoding import joined
from groundwire_bias_audit.examples import Examples
from groundwire_bias_audit.functional import Counts
from groundwire_bias_audit.grouping import Groups, read_groups
from groundwire_bias_audit.inputs import Outputs
from groundwire_bias_audit.paired import pair_counts
from groundwire_bias_audit.stream import BUFFER, Stream, joined_outputs

#: Ids of different loaders are kept apart by this.
LOADER_STEP = 2**40


@dataclass(frozen=True)
class Record:
    """The rows of a pass, in order.

    Attributes:
        outputs: Labels, predictions and scores.
        features: Group values of each row.
        ids: Data set index plus ``LOADER_STEP`` times the loader's number, or None where there are none.
    """

    outputs: Outputs
    features: Mapping[str, list[Any]]
    ids: NDArray[np.int64] | None

    @property
    def sample_ids(self) -> NDArray[np.int64] | None:
        """Data set index of each row, of whatever loader."""
        return None if self.ids is None else self.ids % LOADER_STEP

    def take(self, rows: NDArray[Any]) -> Record:
        """Only ``rows``, in that order."""
        o = self.outputs
        scores = None if o.scores is None else o.scores[rows]
        features = {name: [values[i] for i in rows] for name, values in self.features.items()}
        kept = replace(o, labels=o.labels[rows], predictions=o.predictions[rows], scores=scores)
        return Record(kept, features, None if self.ids is None else self.ids[rows])


class Pass:
    """Takes the batches of one version.

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
        self.stream, self.examples = Stream(threshold, max_groups), Examples()
        self.keep, self.count, self.threshold, self.task, self._resolved = keep, count, threshold, task, resolved
        self._batches: list[tuple[Tensor, Any, Mapping[str, Any], Any]] = []
        self._rows = 0
        self._kept: list[Record] = []

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
        outputs = outputs_of(torch.cat([b[0] for b in batches]), labels, self.threshold, self.task)
        self.task = outputs.task
        features = self._resolved({name: joined([b[2][name] for b in batches]) for name in batches[0][2]})
        ids = None if any(b[3] is None for b in batches) else np.concatenate([b[3] for b in batches])
        if self.count:
            self.stream.update(outputs, features)
            if ids is not None:
                self.examples.update(outputs, features, ids)
        if self.keep:
            self._kept.append(Record(outputs, {name: values.tolist() for name, values in features.items()}, ids))

    def record(self) -> Record | None:
        """The rows that were kept, or None without any."""
        self.flush()
        if not self._kept:
            return None
        names = self._kept[0].features
        ids = [r.ids for r in self._kept if r.ids is not None]
        return Record(
            joined_outputs([r.outputs for r in self._kept]),
            {name: [v for r in self._kept for v in r.features[name]] for name in names},
            np.concatenate(ids) if len(ids) == len(self._kept) else None,
        )


def aligned(first: Record, second: Record) -> Record | None:
    """``second`` in the rows of ``first``, or None if they cannot be matched.

    By id; where there are none, by position if the labels agree, as they do without shuffling.
    """
    if first.outputs.rows != second.outputs.rows:
        return None
    if first.ids is not None and second.ids is not None:
        if (first.ids == second.ids).all():
            return second
        a, b = np.argsort(first.ids, kind="stable"), np.argsort(second.ids, kind="stable")
        if (first.ids[a] != second.ids[b]).any():
            return None
        order = np.empty_like(a)
        order[a] = b
        return second.take(order)
    return second if np.array_equal(first.outputs.labels, second.outputs.labels) else None


def codes_of(record: Record, groups: Groups) -> NDArray[np.int64]:
    """Cell of each row in ``groups``."""
    read = read_groups(record.features, rows=record.outputs.rows, max_groups=10**9)
    assert read.codes is not None
    places = [
        np.array([groups.levels[i].index(value) for value in read.levels[i]], np.int64)
        for i in range(len(groups.levels))
    ]
    coordinates = np.unravel_index(read.codes, read.shape)
    found: NDArray[np.int64] = np.ravel_multi_index(
        tuple(place[c] for place, c in zip(places, coordinates, strict=True)), groups.shape
    )
    return found


def compared(first: Record, second: Record, groups: Groups) -> tuple[Counts, Counts]:
    """Counts of pairs and flips (:func:`pair_counts`) of two passes over the same rows in the same order."""
    return pair_counts(codes_of(first, groups), first.outputs, second.outputs, groups.size)
