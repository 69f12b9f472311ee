"""What an audit found: tables, tests, a verdict, and the ways to take them elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.evidence import Evidence
from groundwire_bias_audit.functional import rate, spread
from groundwire_bias_audit.gate import Gate, Verdict
from groundwire_bias_audit.grouping import unwrapped
from groundwire_bias_audit.judging import Test, decide
from groundwire_bias_audit.paired import Comparison
from groundwire_bias_audit.questions import describe, tests_of
from groundwire_bias_audit.tables import (
    by_target,
    columns_of,
    confusion_by_confidence,
    impact,
    intervals_by_group,
    metrics_by_group,
)


@dataclass(frozen=True)
class AuditResult:
    """The outcome of :func:`groundwire_bias_audit.audit`. Tables are made when they are asked for.

    Attributes:
        evidence: Sums by group.
        gate: When a gap is a disparity.
        comparison: What changed from the baseline, if there is one.
        metrics: Columns to show; None for all of the task.
        n_boot: Bootstrap draws.
        ci_quantiles: Of the intervals.
        random_state: Seed of bootstrap and permutations.
        meta: Facts about the audited data and model, for the reports.
    """

    evidence: Evidence
    gate: Gate
    comparison: Comparison | None = None
    metrics: tuple[str, ...] | None = None
    n_boot: int = 1000
    ci_quantiles: tuple[float, ...] = (0.025, 0.975)
    random_state: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """Kind of the task: binary, multiclass, multilabel or regression."""
        return self.evidence.task

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the sensitive features."""
        return self.evidence.groups.sensitive

    @property
    def targets(self) -> tuple[Any, ...]:
        """Names of the outputs or classes; ``("",)`` for a task with one."""
        return self.evidence.names

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
        evidence = self._by(features)
        return self._each(target, lambda index, one: self._frame(evidence, index, one))

    def summary(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Overall, smallest and largest value, differences and ratios, as fairlearn's ``MetricFrame`` has them.

        Returns:
            Index: the metric (with the control values in front of it, if there are any; targets as in
            :meth:`to_frame`). Columns: ``overall``, ``group_min``, ``group_max``, ``difference``,
            ``difference_to_overall``, ``ratio``, ``ratio_to_overall``.
        """
        evidence = self._by(features)
        return self._each(target, lambda index, one: self._summary(evidence, index, one))

    def intervals(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Bootstrap intervals of the metrics by group; ``ci_quantiles`` of ``n_boot`` draws.

        Returns:
            Index as :meth:`to_frame`; columns (metric, quantile). An interval of a max - min gap is no test: see
            :attr:`tests`.
        """
        evidence, options = self._by(features), {"n_boot": self.n_boot, "random_state": self.random_state}
        return self._each(
            target,
            lambda index, one: intervals_by_group(
                evidence,
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
        evidence = self._by(features)
        return self._each(target, lambda index, one: confusion_by_confidence(evidence, index))

    def impact_ratios(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Selection rate of each group over the highest one of its target and control values; is it four fifths of it?

        A figure that US employment guidance and New York's rule on hiring tools ask for. It says nothing about
        compliance with either.
        """
        controls = list(range(self.evidence.groups.controls))
        one = self.targets[0] if target is None and len(self.targets) == 1 else target
        frame = replace(self, metrics=("selection_rate",)).to_frame(features, target=one)
        return impact(frame, controls if one is not None else [*controls, frame.index.nlevels - 1])

    @property
    def worst_group(self) -> tuple[Any, float]:
        """The (group, target, label) cell with the lowest accuracy, and that accuracy; empty cells do not count."""
        counts = self.evidence.counts
        if counts is None:
            raise ValueError("worst_group needs labels that are classes")
        hits = np.stack([rate(counts, "true_negative_rate"), rate(counts, "true_positive_rate")], axis=-1)
        if self.task == "multiclass":
            hits[..., 0] = np.nan
        if np.isnan(hits).all():
            return (), math.nan
        group, target, label = np.unravel_index(int(np.nanargmin(hits)), hits.shape)
        cell = (unwrapped(self.evidence.groups.index[group]), self.targets[target], int(label))
        return cell, float(hits[group, target, label])

    @property
    def dropped(self) -> list[Any]:
        """Combinations of feature values that no row has."""
        return [group for group, size in zip(self.evidence.groups.index, self.evidence.size, strict=True) if not size]

    @cached_property
    def tests(self) -> list[Test]:
        """Every gated gap with its P value, corrected over all of them."""
        return tests_of(self.evidence, self.gate, self.random_state)

    @cached_property
    def verdict(self) -> Verdict:
        """``disparity``, ``insufficient data`` or ``pass``; see :class:`Gate`."""
        return decide(self.tests)

    @property
    def disparities(self) -> list[Test]:
        """The tests that failed, largest gap first."""
        return sorted((test for test in self.tests if test.disparity), key=lambda test: -test.gap)

    def gaps(self) -> pd.DataFrame:
        """The tests as a table."""
        columns = [
            "attribute", "metric", "target", "control", "gap", "p_value", "p_adjusted", "disparity", "outliers",
            "small",
        ]  # fmt: skip
        return pd.DataFrame([[getattr(test, name) for name in columns] for test in self.tests], columns=columns)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON with a schema version; undefined numbers are null."""
        from groundwire_bias_audit.export import to_json

        return to_json(self, path)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs no network and no script; all names are escaped."""
        from groundwire_bias_audit.export import to_html

        return to_html(self, path)

    def to_csv(self, path: str | Path | None = None, features: str | Sequence[str] | None = None) -> str:
        """:meth:`to_frame` as CSV; cells that a spreadsheet would take for a formula are quoted with an apostrophe."""
        from groundwire_bias_audit.export import to_csv

        return to_csv(self.to_frame(features), path)

    def __str__(self) -> str:
        small = f", {len(self.dropped)} empty combinations" if self.dropped else ""
        lines = [f"Bias audit ({self.task}, {int(self.evidence.size.sum())} rows{small}): {self.verdict}"]
        return "\n".join(lines + [f"  {describe(test)}" for test in self.disparities])

    def _by(self, features: str | Sequence[str] | None) -> Evidence:
        if features is None:
            return self.evidence
        names = [features] if isinstance(features, str) else list(features)
        for name in names:
            if name not in self.features:
                raise ValueError(f"there is no sensitive feature {name!r}; there are {', '.join(self.features)}")
        return self.evidence.of(names) if names else self.evidence.overall()

    def _target(self, target: Any) -> int:
        if target is None:
            return 0
        if target not in self.targets:
            raise ValueError(f"there is no target {target!r}; there are {list(self.targets)}")
        return self.targets.index(target)

    def _frame(self, evidence: Evidence, target: int, one: bool = False) -> pd.DataFrame:
        return metrics_by_group(evidence, target, one, columns_of(self.task, one, self.metrics))

    def _summary(self, evidence: Evidence, target: int, one: bool) -> pd.DataFrame:
        by_group = self._frame(evidence, target, one).drop(columns="count")
        whole = evidence.overall()
        overall = self._frame(whole, target, one).drop(columns="count")
        size, found = len(overall), {}
        values = by_group.to_numpy().reshape(size, -1, by_group.shape[1])
        for i, control in enumerate(overall.index):
            column = {"overall": overall.to_numpy()[i], **spread(values[i], overall.to_numpy()[i])}
            found[control] = pd.DataFrame(column, index=pd.Index(by_group.columns, name="metric"))
        return pd.concat(found, names=whole.groups.names) if evidence.groups.controls else next(iter(found.values()))

    def _each(self, target: Any, make: Callable[[int, bool], pd.DataFrame]) -> pd.DataFrame:
        """The table of a target, or of all outputs of a multilabel task."""
        if self.task != "multilabel" or target is not None or len(self.targets) == 1:
            return make(self._target(target), target is not None)
        return by_target({name: make(i, False) for i, name in enumerate(self.targets)})
