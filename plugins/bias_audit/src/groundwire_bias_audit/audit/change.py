"""Two models on the same rows: what changed, for whom, and whether a group lost more than the tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from groundwire_bias_audit.audit.gap_tests import with_obstacles
from groundwire_bias_audit.audit.gate import GOOD_WHEN_HIGH, Gate, Test, Verdict, verdict_of
from groundwire_bias_audit.audit.groups import Groups, as_tuple, by_target, unwrapped
from groundwire_bias_audit.audit.hypothesis_tests import adjust, mcnemar
from groundwire_bias_audit.audit.intervals import quantiles, resample
from groundwire_bias_audit.audit.predictions import Outputs
from groundwire_bias_audit.audit.rate_differences import loss_at_least, loss_at_most, paired_p_value
from groundwire_bias_audit.audit.rates import Counts, Floats, ratio


def broken_mended(pairs: Counts) -> tuple[Counts, Counts]:
    """Rows that became wrong and rows that became right, from ``[..., label, before, after]``."""
    broken = pairs[..., 1, 1, 0] + pairs[..., 0, 0, 1]
    return broken, pairs[..., 1, 0, 1] + pairs[..., 0, 1, 0]


def _accuracy(pairs: Counts) -> tuple[Counts, Counts, Counts]:
    return *broken_mended(pairs), pairs.sum(axis=(1, 2, 3))


def _selected(pairs: Counts, label: int) -> tuple[Counts, Counts, Counts]:
    return pairs[:, label, 1, 0], pairs[:, label, 0, 1], pairs[:, label].sum(axis=(1, 2))


def _rejected(pairs: Counts, label: int) -> tuple[Counts, Counts, Counts]:
    fewer, more, trials = _selected(pairs, label)
    return more, fewer, trials


#: Rows by which a rate falls, by which it rises, and those of its denominator. That of precision itself changes.
CHANGES: dict[str, Any] = {
    "accuracy": _accuracy,
    "true_positive_rate": lambda pairs: _selected(pairs, 1),
    "false_negative_rate": lambda pairs: _rejected(pairs, 1),
    "false_positive_rate": lambda pairs: _selected(pairs, 0),
    "true_negative_rate": lambda pairs: _rejected(pairs, 0),
    "selection_rate": lambda pairs: (
        pairs[:, :, 1, 0].sum(axis=1), pairs[:, :, 0, 1].sum(axis=1), pairs.sum(axis=(1, 2, 3))
    ),
}  # fmt: skip


def pair_counts(codes: NDArray[Any], first: Outputs, second: Outputs, groups: int) -> tuple[Counts, Counts]:
    """Counts of pairs of predictions, and of flips.

    Args:
        codes: Group of each row.
        first: The baseline's outputs.
        second: The other model's, on the same rows.
        groups: Number of groups.

    Returns:
        ``[group, target, label, first prediction, second prediction]``, where "prediction" is "right" and the label 1
        for a multiclass task, and ``[group, target]`` rows whose prediction differs.
    """
    if first.task == "multiclass":
        labels = np.ones((len(codes), 1), np.int64)
        a, b = first.correct[:, None], second.correct[:, None]
        flipped = (first.predictions != second.predictions)[:, None]
    else:
        labels, a, b = first.labels, first.predictions, second.predictions
        flipped = a != b
    pairs = [
        np.bincount(
            codes.astype(np.int64) * 8 + labels[:, t] * 4 + a[:, t] * 2 + b[:, t], minlength=8 * groups
        ).reshape(groups, 2, 2, 2)
        for t in range(a.shape[1])
    ]
    flips = [np.bincount(codes, flipped[:, t], minlength=groups) for t in range(a.shape[1])]
    return np.stack(pairs, axis=1), np.stack(flips, axis=1).astype(np.int64)


@dataclass(frozen=True)
class Comparison:
    """Changes from a baseline (the dense model) to another model on the same rows.

    Attributes:
        groups: The cells.
        names: Of the targets.
        pairs: ``[group, target, label, baseline prediction, prediction]``.
        flips: ``[group, target]`` rows whose prediction differs.
        gate: When a change is a disparity: a group is shown to have lost more than ``tolerance``.
        n_boot: Paired bootstrap draws.
        ci_quantiles: Of the intervals.
        random_state: Seed.
    """

    groups: Groups
    names: tuple[Any, ...]
    pairs: Counts
    flips: Counts
    gate: Gate
    n_boot: int = 1000
    ci_quantiles: tuple[float, ...] = (0.025, 0.975)
    random_state: int = 0

    def to_frame(self, features: Sequence[str] | None = None, target: int | None = None) -> pd.DataFrame:
        """One row a group: accuracies, their change with a paired interval, flips, and McNemar's P value.

        ``broken`` rows were right before and are wrong now, ``mended`` the other way. Of several targets all are shown,
        as the last level of the index, unless ``target`` gives the position of one. P values are Holm-corrected over
        all rows shown.
        """
        names = self.groups.sensitive if features is None else tuple(features)
        count = self.pairs.shape[1]
        if target is not None or count == 1:
            found = self._of_target(names, target or 0)
        else:
            found = by_target({self.names[t]: self._of_target(names, t) for t in range(count)})
        return found.assign(mcnemar_p_adjusted=adjust(found["mcnemar_p"].to_numpy()))

    def _of_target(self, names: Sequence[str], target: int) -> pd.DataFrame:
        index = self.groups.keep(names).index
        pairs = self.groups.marginal(self.pairs, names)[:, target]
        flips = self.groups.marginal(self.flips, names)[:, target]
        n = pairs.sum(axis=(1, 2, 3))
        broken, mended = broken_mended(pairs)
        p = [mcnemar(int(b), int(m)) if size else math.nan for b, m, size in zip(broken, mended, n, strict=True)]
        draws = resample(pairs, self.n_boot, np.random.default_rng(self.random_state))
        down, up = broken_mended(draws)
        bounds = quantiles(ratio(up - down, draws.sum(axis=(2, 3, 4))), self.ci_quantiles)
        right = pairs[:, 0, 0].sum(axis=1) + pairs[:, 1, 1].sum(axis=1)
        columns = {
            "count": n, "baseline_accuracy": ratio(right, n), "accuracy": ratio(right + mended - broken, n),
            "accuracy_change": ratio(mended - broken, n), "change_low": bounds[0], "change_high": bounds[-1],
            "flip_rate": ratio(flips, n), "broken": broken, "mended": mended, "mcnemar_p": p,
        }  # fmt: skip
        return pd.DataFrame(columns, index=index)

    @cached_property
    def tests(self) -> list[Test]:
        """Tests of whether a gated rate (but precision) got worse by more than the tolerance in some group."""
        assert self.gate.metrics is not None
        single = not self.pairs[:, :, 0].any()  # "right" of a multiclass task
        found = [
            block
            for names in self.gate.attributes(self.groups.sensitive)
            for metric in self.gate.metrics
            if metric in CHANGES and (metric == "accuracy" or not single)
            for target in range(self.pairs.shape[1])
            for block in self._blocks(names, metric, target)
        ]
        enough = [rows >= self.gate.min_count for _, (_, _, rows) in found]
        judged = [changes[:, good].astype(np.int64) for (_, changes), good in zip(found, enough, strict=True)]
        level = self.gate.alpha / max(1, sum(changes.shape[1] for changes in judged))
        p_values = [
            np.array([paired_p_value(b, c, n, self.gate.tolerance, level) for b, c, n in changes.T.tolist()])
            for changes in judged
        ]
        adjusted = adjust(np.concatenate([np.empty(0), *p_values]), self.gate.correction)
        ends = np.cumsum([0, *map(len, p_values)])
        tests = [
            self._test(head, good, changes, p, adjusted[start:end], level)
            for (head, _), good, changes, p, start, end in zip(
                found, enough, judged, p_values, ends[:-1], ends[1:], strict=True
            )
        ]
        return with_obstacles(tests, [rows for _, (_, _, rows) in found], {}, self.gate)

    @property
    def verdict(self) -> Verdict:
        """Verdict on the change: a disparity where a group lost; gains, and gaps that stay as they were, pass."""
        return verdict_of(self.tests)

    def _blocks(self, names: list[str], metric: str, target: int) -> Iterator[tuple[Test, Counts]]:
        """Rows by group that get worse, that get better, and all, for each combination of control values."""
        groups = self.groups.keep(names)
        pairs = self.groups.marginal(self.pairs, names)[:, target]
        down, up, rows = CHANGES[metric](pairs)
        changes = np.stack([down, up, rows] if metric in GOOD_WHEN_HIGH else [up, down, rows])
        labels = [as_tuple(label) for label in groups.index]
        target_name = str(self.names[target]) if len(self.names) > 1 and self.pairs.shape[1] > 1 else ""
        width = groups.size // math.prod(groups.shape[: groups.controls])
        for start in range(0, groups.size, width):
            cells = [cell for cell in range(start, start + width) if pairs[cell].any()]
            if cells:
                inside = tuple(unwrapped(labels[cell][groups.controls :]) for cell in cells)
                control = labels[start][: groups.controls]
                yield Test(" x ".join(names), metric, target_name, control, inside, change=True), changes[:, cells]

    def _test(
        self, head: Test, enough: NDArray[np.bool_], changes: Counts, p: Floats, adjusted: Floats, level: float
    ) -> Test:
        groups, small = (
            tuple(g for g, good in zip(head.groups, enough, strict=True) if bool(good) is wanted)
            for wanted in (True, False)
        )
        worse, better, rows = changes
        loss = (worse - better) / rows
        rates = tuple((-loss if head.metric in GOOD_WHEN_HIGH else loss).tolist())
        head = replace(head, metric=f"{head.metric}_change", groups=groups, small=small, rates=rates,
                       rows=tuple(rows.tolist()))  # fmt: skip
        if not len(p):
            return head
        lost = [position for position in np.argsort(-loss, kind="stable") if adjusted[position] <= self.gate.alpha]
        at_least, at_most = (partial(limit, worse, better, rows, level) for limit in (loss_at_least, loss_at_most))
        return replace(
            head, gap=float(loss.max()), p_value=float(p.min()), p_adjusted=float(adjusted.min()),
            disparity=bool(lost), outliers=tuple(groups[position] for position in lost),
            limits=(at_least, at_most),
        )  # fmt: skip
