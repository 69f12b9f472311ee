"""Record of an audit: counts, gate and comparison; tables, tests and the verdict follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.audit.change import Comparison
from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.gap_tests import gap_tests
from groundwire_bias_audit.audit.gate import Gate, Test, Verdict, conclusion, verdict_of
from groundwire_bias_audit.audit.groups import by_target, unwrapped
from groundwire_bias_audit.audit.rates import rate, spread
from groundwire_bias_audit.audit.tables import (
    columns_of,
    confusion_by_confidence,
    impact_ratios,
    intervals_by_group,
    metrics_by_group,
)


@dataclass(frozen=True)
class AuditRecord:
    """Counts of an audit and how they are judged. Tables are made when they are asked for.

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

    counts: GroupCounts
    gate: Gate
    comparison: Comparison | None = None
    metrics: tuple[str, ...] | None = None
    n_boot: int = 1000
    ci_quantiles: tuple[float, ...] = (0.025, 0.975)
    random_state: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The audit in a few words: task, rows, combinations without rows."""
        empty = f", {len(self.dropped)} empty combinations" if self.dropped else ""
        return f"Bias audit ({self.task}, {int(self.counts.size.sum())} rows{empty})"

    @property
    def task(self) -> str:
        """Kind of the task: binary, multiclass, multilabel or regression."""
        return self.counts.task

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the sensitive features."""
        return self.counts.groups.sensitive

    @property
    def targets(self) -> tuple[Any, ...]:
        """Names of the outputs or classes; ``("",)`` for a task with one."""
        return self.counts.names

    def to_frame(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Metrics by group.

        Args:
            features: Sensitive features to group by; None for all, crossed. ``[]`` gives all rows together.
            target: An output of a multilabel task, or a class against the rest. None shows all outputs of a multilabel
                task, as the last level of the index.

        Returns:
            Index: the group, or a product of features. Columns: ``count`` and the metrics, named as fairlearn's
            functions. NaN where a metric is undefined. A combination that no row has is there with count 0.

        Raises:
            ValueError: There is no such feature or target.
        """
        counts = self._counts_by(features)
        return self._of_targets(target, lambda index, one: self._frame(counts, index, one))

    def summary(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Overall, smallest and largest value, differences and ratios, as fairlearn's ``MetricFrame`` has them.

        Returns:
            Index: the metric (with the control values in front of it, if there are any; targets as in
            :meth:`to_frame`). Columns: ``overall``, ``group_min``, ``group_max``, ``difference``,
            ``difference_to_overall``, ``ratio``, ``ratio_to_overall``.
        """
        counts = self._counts_by(features)
        return self._of_targets(target, lambda index, one: self._summary(counts, index, one))

    def intervals(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Bootstrap intervals of the metrics by group; ``ci_quantiles`` of ``n_boot`` draws.

        Returns:
            Index as :meth:`to_frame`; columns (metric, quantile). An interval of a max - min gap is no test: see
            :attr:`tests`.
        """
        counts, options = self._counts_by(features), {"n_boot": self.n_boot, "random_state": self.random_state}
        return self._of_targets(
            target,
            lambda index, one: intervals_by_group(
                counts,
                index,
                one,
                columns_of(self.task, one, self.metrics),
                ci_quantiles=self.ci_quantiles,
                **options,
            ),
        )

    def confidence(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """TP, FN, FP and TN by group, split into certain (score outside 0.1-0.9) and uncertain.

        Raises:
            ValueError: The audit has no scores, or the task is neither binary nor multilabel.
        """
        counts = self._counts_by(features)
        return self._of_targets(target, lambda index, one: confusion_by_confidence(counts, index))

    def impact_ratios(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Selection rate of each group over the highest one of its target and control values; is it four fifths of it?

        A figure that US employment guidance and New York's rule on hiring tools ask for. It says nothing about
        compliance with either. Groups with fewer rows than the gate's ``min_count`` are marked ``too_few_rows`` and
        neither judged nor compared with.

        Raises:
            ValueError: The task has no selection rate.
        """
        if self.task == "regression" or (self.task == "multiclass" and target is None):
            raise ValueError("there is no selection rate -> of a multiclass task name a class as target")
        counts = self._counts_by(features)
        return self._of_targets(target, lambda index, _: impact_ratios(counts, index, self.gate.min_count))

    @property
    def worst_group(self) -> tuple[Any, float]:
        """The (group, target, label) cell with the lowest accuracy, and that accuracy; empty cells do not count."""
        counts = self.counts.confusion
        if counts is None:
            raise ValueError("worst_group needs labels that are classes")
        hits = np.stack([rate(counts, "true_negative_rate"), rate(counts, "true_positive_rate")], axis=-1)
        if self.task == "multiclass":
            hits[..., 0] = np.nan
        if np.isnan(hits).all():
            return (), math.nan
        group, target, label = np.unravel_index(int(np.nanargmin(hits)), hits.shape)
        cell = (unwrapped(self.counts.groups.index[group]), self.targets[target], int(label))
        return cell, float(hits[group, target, label])

    @property
    def dropped(self) -> list[Any]:
        """Combinations of feature values that no row has."""
        return [group for group, size in zip(self.counts.groups.index, self.counts.size, strict=True) if not size]

    @cached_property
    def tests(self) -> list[Test]:
        """Every gated gap with its P value, corrected over all of them."""
        return gap_tests(self.counts, self.gate)

    @cached_property
    def verdict(self) -> Verdict:
        """``disparity``, ``insufficient data`` or ``pass``; see :class:`Gate`."""
        return verdict_of(self.tests)

    @property
    def conclusion(self) -> str:
        """Reasons of the verdict in words: the disparities, the largest gap that is ruled out, or what is missing."""
        return conclusion(self.tests, self.gate)

    @property
    def disparities(self) -> list[Test]:
        """The tests that failed, largest gap first."""
        return sorted((test for test in self.tests if test.disparity), key=lambda test: -test.gap)

    def gaps(self) -> pd.DataFrame:
        """The tests as a table."""
        columns = [
            "attribute", "metric", "target", "control", "gap", "p_value", "p_adjusted", "disparity", "outliers",
            "small", "insufficient",
        ]  # fmt: skip
        table = pd.DataFrame([[getattr(test, name) for name in columns] for test in self.tests], columns=columns)
        bounds = np.array([test.bounds for test in self.tests]).reshape(-1, 2)
        table.insert(5, "gap_low", bounds[:, 0])
        table.insert(6, "gap_high", bounds[:, 1])
        return table

    def _counts_by(self, features: str | Sequence[str] | None) -> GroupCounts:
        if features is None:
            return self.counts
        names = [features] if isinstance(features, str) else list(features)
        for name in names:
            if name not in self.features:
                raise ValueError(f"there is no sensitive feature {name!r}; there are {', '.join(self.features)}")
        return self.counts.of(names) if names else self.counts.overall()

    def _position(self, target: Any) -> int:
        if target is None:
            return 0
        if target not in self.targets:
            raise ValueError(f"there is no target {target!r}; there are {list(self.targets)}")
        return self.targets.index(target)

    def _frame(self, counts: GroupCounts, target: int, one: bool = False) -> pd.DataFrame:
        return metrics_by_group(counts, target, one, columns_of(self.task, one, self.metrics))

    def _summary(self, counts: GroupCounts, target: int, one: bool) -> pd.DataFrame:
        by_group = self._frame(counts, target, one).drop(columns="count")
        whole = counts.overall()
        overall = self._frame(whole, target, one).drop(columns="count")
        size, found = len(overall), {}
        values = by_group.to_numpy().reshape(size, -1, by_group.shape[1])
        for i, control in enumerate(overall.index):
            column = {"overall": overall.to_numpy()[i], **spread(values[i], overall.to_numpy()[i])}
            found[control] = pd.DataFrame(column, index=pd.Index(by_group.columns, name="metric"))
        return pd.concat(found, names=whole.groups.names) if counts.groups.controls else next(iter(found.values()))

    def _of_targets(self, target: Any, make: Callable[[int, bool], pd.DataFrame]) -> pd.DataFrame:
        """The table of a target, or of all outputs of a multilabel task."""
        if self.task != "multilabel" or target is not None or len(self.targets) == 1:
            return make(self._position(target), target is not None)
        return by_target({name: make(i, False) for i, name in enumerate(self.targets)})
