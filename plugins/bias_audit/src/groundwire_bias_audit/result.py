"""What an audit found: tables, tests, a verdict, and the ways to take them elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.bootstrap import bootstrap, bootstrap_rows, bootstrap_scores
from groundwire_bias_audit.evidence import Evidence, regression_table
from groundwire_bias_audit.functional import RATES, Floats, rate, spread
from groundwire_bias_audit.gate import Gate, Test, Verdict, check_metric, decide
from groundwire_bias_audit.grouping import as_tuple
from groundwire_bias_audit.paired import Comparison
from groundwire_bias_audit.questions import describe, tests_of, unwrapped

SCORE_METRICS = ("roc_auc", "calibration_error", "uncertainty")
REGRESSION_METRICS = (
    "mean_label",
    "mean_prediction",
    "mean_error",
    "mean_absolute_error",
    "mean_squared_error",
    "r2_score",
)
METRICS = (*RATES, *SCORE_METRICS, *REGRESSION_METRICS)


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
        if self.task == "multilabel" and target is None and len(self.targets) > 1:
            frames = {name: self._frame(evidence, i) for i, name in enumerate(self.targets)}
            level = "target" if "target" not in evidence.groups.names else "target of the model"
            names = [*evidence.groups.names, level]
            joined = pd.concat(frames, names=[level, *evidence.groups.names])
            return joined.reorder_levels(names).reindex(
                [(*as_tuple(g), t) for g in evidence.groups.index for t in frames]
            )
        return self._frame(evidence, self._target(target), target is not None)

    def summary(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Overall, smallest and largest value, differences and ratios, as fairlearn's ``MetricFrame`` has them.

        Returns:
            Index: the metric (with the control values in front of it, if there are any). Columns: ``overall``,
            ``group_min``, ``group_max``, ``difference``, ``difference_to_overall``, ``ratio``, ``ratio_to_overall``.
        """
        evidence = self._by(features)
        which = self._target(target), target is not None
        by_group = self._frame(evidence, *which).drop(columns="count")
        whole = evidence.overall()
        overall = self._frame(whole, *which).drop(columns="count")
        size, found = len(overall), {}
        values = by_group.to_numpy().reshape(size, -1, by_group.shape[1])
        for i, control in enumerate(overall.index):
            column = {"overall": overall.to_numpy()[i], **spread(values[i], overall.to_numpy()[i])}
            found[control] = pd.DataFrame(column, index=pd.Index(by_group.columns, name="metric"))
        return pd.concat(found, names=whole.groups.names) if evidence.groups.controls else next(iter(found.values()))

    def intervals(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Bootstrap intervals of the metrics by group; ``ci_quantiles`` of ``n_boot`` draws.

        Returns:
            Index as :meth:`to_frame`; columns (metric, quantile). An interval of a max - min gap is no test: see
            :attr:`tests`.
        """
        evidence, which = self._by(features), self._target(target)
        found: dict[str, Floats] = {}
        if evidence.counts is not None:
            found |= self._rate_intervals(evidence, which, target is not None)
        histogram = None if self.task == "multiclass" and target is not None else evidence.score_histogram()
        if histogram is not None and evidence.squares is None:
            scores = bootstrap_scores(
                histogram, n_boot=min(self.n_boot, 200), ci_quantiles=self.ci_quantiles, random_state=self.random_state
            )
            axis = which if self.task == "multilabel" else 0
            found |= {name: value[:, :, axis] for name, value in scores.items()}
        shown = [name for name in self._columns(target is not None) if name in found]
        columns = pd.MultiIndex.from_product([shown, list(self.ci_quantiles)], names=["metric", "quantile"])
        values = [found[name][i] for name in shown for i in range(len(self.ci_quantiles))]
        data = np.stack(values, axis=1) if values else np.empty((evidence.groups.size, 0))
        return pd.DataFrame(data, index=evidence.groups.index, columns=columns)

    def confidence(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """TP, FN, FP and TN by group, split into certain (score outside 0.1-0.9) and uncertain.

        Raises:
            ValueError: The audit has no scores, or the task is neither binary nor multilabel.
        """
        evidence = self._by(features)
        counts = evidence.confident()
        if counts is None:
            raise ValueError("confidence needs scores of a binary or multilabel task")
        cells = counts[:, self._target(target)]
        names = {("TP", 1, 1), ("FN", 1, 0), ("FP", 0, 1), ("TN", 0, 0)}
        columns = {
            (name, kind): cells[:, y, p, certain]
            for name, y, p in sorted(names, reverse=True)
            for kind, certain in (("certain", 1), ("uncertain", 0))
        }
        return pd.DataFrame(columns, index=evidence.groups.index)

    def impact_ratios(self, features: str | Sequence[str] | None = None, *, target: Any = None) -> pd.DataFrame:
        """Selection rate of each group over the highest one, and whether it is at least four fifths.

        A figure that US employment guidance and New York's rule on hiring tools ask for. It says nothing about
        compliance with either.
        """
        frame = self.to_frame(features, target=self.targets[0] if target is None else target)
        if "selection_rate" not in frame:
            raise ValueError("impact_ratios needs the metric selection_rate")
        best = frame["selection_rate"].max()
        values = frame["selection_rate"] / best if best > 0 else frame["selection_rate"] * math.nan
        four_fifths = (values >= 0.8).astype(object).where(values.notna(), None)
        return pd.DataFrame(
            {
                "count": frame["count"],
                "selection_rate": frame["selection_rate"],
                "impact_ratio": values,
                "four_fifths": four_fifths,
            }
        )

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

    def _columns(self, one: bool) -> list[str]:
        """Metrics of the task; ``one`` for a single target or class."""
        if self.task == "regression":
            known: Sequence[str] = REGRESSION_METRICS
        elif self.task == "multiclass":
            known = tuple(RATES) if one else ("accuracy", *SCORE_METRICS[1:])
        else:
            known = (*RATES, *SCORE_METRICS)
        return [name for name in known if self.metrics is None or name in self.metrics]

    def _frame(self, evidence: Evidence, target: int, one: bool = False) -> pd.DataFrame:
        values: dict[str, Any] = {"count": evidence.size}
        if evidence.moments is not None:
            values |= regression_table(evidence.moments)
        elif evidence.hits is not None and not one:
            values["accuracy"] = rate(evidence.hits[:, 0], "accuracy")
        elif evidence.counts is not None:
            values |= {name: rate(evidence.counts[:, target], name) for name in RATES}
        shown = self._columns(one)
        if set(shown) & set(SCORE_METRICS):
            undefined = np.full((evidence.groups.size, len(self.targets)), np.nan)
            table = evidence.score_table()
            axis = 0 if self.task == "multiclass" else target
            values |= {name: table.get(name, undefined)[:, axis] for name in SCORE_METRICS}
        return pd.DataFrame({name: values[name] for name in ("count", *shown)}, index=evidence.groups.index)

    def _rate_intervals(self, evidence: Evidence, target: int, one: bool) -> dict[str, Floats]:
        options: dict[str, Any] = {
            "n_boot": self.n_boot, "ci_quantiles": self.ci_quantiles, "random_state": self.random_state,
        }  # fmt: skip
        single = evidence.hits is not None and not one
        counts = evidence.hits if single else evidence.counts
        assert counts is not None
        names = ("accuracy",) if single else tuple(RATES)
        if evidence.squares is None:
            found = bootstrap(counts[:, min(target, counts.shape[1] - 1)], names, **options)
            return {name: aggregates["by_group"] for name, aggregates in found.items()}
        if evidence.rows is None or evidence.rows.weights is None or evidence.groups.codes is None:
            return {}
        labels, predictions = evidence.rows.outputs.targets
        label, prediction = labels[:, target], predictions[:, target]
        if single:
            label, prediction = np.ones_like(label), evidence.rows.outputs.correct
        cells = evidence.groups.codes.astype(np.int64) * 4 + label * 2 + prediction
        return bootstrap_rows(cells, evidence.rows.weights, evidence.groups.size, names, **options)


def checked_metrics(metrics: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """``metrics`` if all are known.

    Raises:
        ValueError: One is not; the nearest is shown.
    """
    if metrics is None:
        return None
    return tuple(check_metric(name, METRICS) for name in ([metrics] if isinstance(metrics, str) else metrics))
