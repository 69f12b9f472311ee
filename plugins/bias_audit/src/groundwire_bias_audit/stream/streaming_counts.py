"""Counts added up batch by batch: integer sums by group, the same for any order and any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire import PluginError
from groundwire_bias_audit.audit.association import gram
from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.groups import Groups, joined, read_groups
from groundwire_bias_audit.audit.predictions import Outputs, Task
from groundwire_bias_audit.audit.rates import MOMENTS, Counts
from groundwire_bias_audit.audit.score_metrics import Bins, Histogram
from groundwire_bias_audit.stream.sensitive_features import GroupReader

#: Rows that are kept before they are counted: counting many at once is far cheaper than a batch at a time.
BUFFER = 16_384
#: Largest state, in bytes.
LARGEST = 512 * 2**20


@dataclass(frozen=True)
class Shape:
    """Task, targets and features that all batches of a stream have in common."""

    task: Task
    names: tuple[Any, ...]
    features: tuple[str, ...]


class StreamingCounts:
    """Adds up batches of one model variant.

    Args:
        threshold: Predicted 1 where score >= threshold.
        max_groups: Most values of a feature.

    Example:
        >>> from groundwire_bias_audit.audit.predictions import read_outputs
        >>> stream = StreamingCounts()
        >>> stream.update(read_outputs([0, 1], np.float32([0.2, 0.9])), {"sex": ["f", "m"]})
        >>> stream.update(read_outputs([1], np.float32([0.4])), {"sex": ["m"]})
        >>> stream.group_counts().size.tolist()
        [1, 2]
    """

    def __init__(self, threshold: float = 0.5, max_groups: int = 100) -> None:
        self.threshold, self.max_groups = threshold, max_groups
        self.shape: Shape | None = None
        self.rows = 0
        self._pending: list[tuple[Outputs, Mapping[str, Any]]] = []
        self._pending_rows = 0
        self._sums: dict[tuple[Any, ...], dict[str, Counts]] = {}
        self._gram: Counts | None = None

    def update(self, outputs: Outputs, groups: Mapping[str, Any]) -> None:
        """Add a batch.

        Args:
            outputs: Its labels and scores.
            groups: Values of each feature, each of the batch's length.

        Raises:
            ValueError: Task or features differ from those of the first batch, or a feature has too many values.
        """
        shape = Shape(outputs.task, outputs.names, tuple(groups))
        if self.shape is None:
            self.shape = shape
        if shape != self.shape:
            raise ValueError(f"this batch is {shape}, and the first one was {self.shape}")
        if not outputs.rows:
            return
        self._pending.append((outputs, groups))
        self.rows += outputs.rows
        self._pending_rows += outputs.rows
        if self._pending_rows >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Count what is pending."""
        if not self._pending:
            return
        assert self.shape is not None
        outputs = joined_outputs([o for o, _ in self._pending])
        features = {name: joined([groups[name] for _, groups in self._pending]) for name in self.shape.features}
        self._pending, self._pending_rows = [], 0
        groups = read_groups(features, rows=outputs.rows, max_groups=self.max_groups)
        keys = list(groups.index) if len(groups.names) > 1 else [(level,) for level in groups.levels[0]]
        assert groups.codes is not None
        found, codes = np.unique(groups.codes, return_inverse=True)
        self._refuse_large(len(found), outputs)
        for name, sums in _sums(outputs, codes, len(found), self.threshold).items():
            for row, cell in enumerate(found):
                held = self._sums.setdefault(tuple(keys[cell]), {})
                held[name] = held[name] + sums[row] if name in held else sums[row].copy()
        if outputs.task == "multilabel":
            products = gram(outputs.predictions)
            self._gram = products if self._gram is None else self._gram + products

    def _refuse_large(self, new: int, outputs: Outputs) -> None:
        targets = len(outputs.names) if outputs.task == "multilabel" else 1
        if (len(self._sums) + new) * targets * 2 * 1010 * 8 > LARGEST:
            raise ValueError(
                f"{len(self._sums)} groups x {targets} targets are too many to keep score histograms of "
                "-> audit fewer features at a time, or coarser ones"
            )

    def merged(self, gathered: Callable[[Any], Sequence[Any]]) -> StreamingCounts:
        """The sum over processes.

        Args:
            gathered: Returns its argument as it is on every process.
        """
        self.flush()
        whole = StreamingCounts(self.threshold, self.max_groups)
        for shape, rows, sums, products in gathered((self.shape, self.rows, self._sums, self._gram)):
            if shape is None:
                continue
            whole.shape = whole.shape or shape
            if shape != whole.shape:
                raise ValueError(f"one process has {shape}, and another one {whole.shape}")
            whole.rows += rows
            for key, values in sums.items():
                held = whole._sums.setdefault(key, {})
                for name, value in values.items():
                    held[name] = held[name] + value if name in held else value
            if products is not None:
                whole._gram = products if whole._gram is None else whole._gram + products
        return whole

    def group_counts(self) -> GroupCounts:
        """Return what was added up.

        Raises:
            ValueError: Nothing was.
        """
        self.flush()
        if self.shape is None or not self._sums:
            raise ValueError("no row was seen")
        groups = _grid(self.shape.features, list(self._sums), self.max_groups)
        cells = np.ravel_multi_index(
            tuple(np.array([groups.levels[i].index(key[i]) for key in self._sums]) for i in range(len(groups.names))),
            groups.shape,
        )
        example = next(iter(self._sums.values()))
        state = {name: np.zeros((groups.size, *value.shape), value.dtype) for name, value in example.items()}
        for cell, values in zip(cells, self._sums.values(), strict=True):
            for name, value in values.items():
                state[name][cell] = value
        return _group_counts(self.shape, groups, state, self.threshold)

    @property
    def products(self) -> Counts | None:
        """Sums of products of the hard predictions of a multilabel task; see :func:`interdependence`."""
        self.flush()
        return self._gram


def joined_outputs(outputs: Sequence[Outputs]) -> Outputs:
    """Outputs of several batches as those of one."""
    first = outputs[0]
    scores = None if first.scores is None else np.concatenate([o.scores for o in outputs if o.scores is not None])
    labels, predictions = (np.concatenate([getattr(o, name) for o in outputs]) for name in ("labels", "predictions"))
    return Outputs(first.task, first.names, labels, predictions, scores)


def _sums(outputs: Outputs, codes: NDArray[Any], groups: int, threshold: float) -> dict[str, Any]:
    size = np.bincount(codes, minlength=groups)
    if outputs.task == "regression":
        error = outputs.predictions - outputs.labels
        columns = (np.ones_like(error), outputs.labels, outputs.predictions, np.abs(error), error**2, outputs.labels**2)
        assert len(columns) == len(MOMENTS)
        return {"size": size, "moments": np.stack([np.bincount(codes, c, minlength=groups) for c in columns], 1)}
    assert outputs.scores is not None
    scores = outputs.scores.astype(np.float32)  # one type of edges for all batches
    if outputs.task == "multiclass":
        classes = len(outputs.names)
        cell = (codes * classes + outputs.labels) * classes + outputs.predictions
        right, best = outputs.correct[:, None].astype(np.uint8), scores.max(axis=1)[:, None]
        histogram = Histogram.of(codes, right, best, groups, Bins.make(np.float32))
        confusion = np.bincount(cell, minlength=groups * classes**2).reshape(groups, classes, classes)
        return {"size": size, "classes": confusion, "bins": histogram.counts, "mass": histogram.mass}
    histogram = Histogram.of(codes, outputs.labels, scores, groups, Bins.make(np.float32, threshold))
    return {"size": size, "bins": histogram.counts, "mass": histogram.mass}


def _grid(names: tuple[str, ...], keys: Sequence[tuple[Any, ...]], max_groups: int) -> Groups:
    """The product of the values that were seen."""
    columns = {name: _column([key[i] for key in keys]) for i, name in enumerate(names)}
    groups = read_groups(columns, rows=len(keys), max_groups=max_groups)
    return Groups(groups.names, groups.levels)


def _column(values: list[Any]) -> NDArray[Any]:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _group_counts(shape: Shape, groups: Groups, state: Mapping[str, Any], threshold: float) -> GroupCounts:
    size = state["size"]
    if shape.task == "regression":
        return GroupCounts("regression", ("",), groups, size, moments=state["moments"])
    bins = Bins.make(np.float32, threshold if shape.task != "multiclass" else 0.5)
    histogram = Histogram(state["bins"], state["mass"], bins)
    if shape.task != "multiclass":
        return GroupCounts(shape.task, shape.names, groups, size, histogram.confusion, histogram=histogram)
    classes = state["classes"]
    right = np.trace(classes, axis1=1, axis2=2)
    hits = np.zeros((len(size), 1, 2, 2), np.int64)
    hits[:, 0, 1, 0], hits[:, 0, 1, 1] = size - right, right
    return GroupCounts("multiclass", shape.names, groups, size, one_against_rest(classes), hits, histogram=histogram)


def one_against_rest(classes: Counts) -> Counts:
    """``[group, class, label, prediction]`` from the confusion matrix ``[group, true class, predicted class]``.

    Example:
        >>> one_against_rest(np.array([[[3, 1], [0, 2]]]))[0, 1].tolist()
        [[3, 1], [0, 2]]
    """
    true, predicted, total = classes.sum(axis=2), classes.sum(axis=1), classes.sum(axis=(1, 2))[:, None]
    hit = np.diagonal(classes, axis1=1, axis2=2)
    negatives = total - true - predicted + hit
    return np.stack([np.stack([negatives, predicted - hit], -1), np.stack([true - hit, hit], -1)], axis=-2)


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
