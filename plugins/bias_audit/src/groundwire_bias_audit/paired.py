"""Two models on the same rows: what changed, for whom, and whether it changed more for some than for others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from groundwire_bias_audit.bootstrap import quantiles, resample
from groundwire_bias_audit.change import CHANGES, broken_mended, tested_change
from groundwire_bias_audit.functional import Counts, ratio
from groundwire_bias_audit.gate import Gate, Verdict
from groundwire_bias_audit.grouping import Groups, as_tuple, unwrapped
from groundwire_bias_audit.inputs import Outputs
from groundwire_bias_audit.judging import Test, decide
from groundwire_bias_audit.null import adjust, mcnemar
from groundwire_bias_audit.tables import by_target


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
    """What changed from a baseline (the dense model) to another model on the same rows.

    Attributes:
        groups: The cells.
        names: Of the targets.
        pairs: ``[group, target, label, baseline prediction, prediction]``.
        flips: ``[group, target]`` rows whose prediction differs.
        gate: When a change is a disparity: it differs between groups by more than ``tolerance``, significantly.
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
        """Whether the gated rates (but precision) changed more in some groups, for every attribute."""
        assert self.gate.metrics is not None
        single = not self.pairs[:, :, 0].any()  # "right" of a multiclass task
        metrics = [m for m in self.gate.metrics if m == "accuracy" or not single]
        asked = [
            (names, metric, target)
            for names in self.gate.attributes(self.groups.sensitive)
            for target in range(self.pairs.shape[1])
            for metric in metrics
            if metric in CHANGES
        ]
        blocks = math.prod(self.groups.shape[: self.groups.controls])
        draws = self.gate.permutations(len(asked) * blocks)
        raw = [test for i, question in enumerate(asked) for test in self._raw(*question, i, draws)]
        adjusted = adjust([test.p_value for test in raw], self.gate.correction)
        return [_judged(test, float(p), self.gate) for test, p in zip(raw, adjusted, strict=True)]

    @property
    def verdict(self) -> Verdict:
        """Whether the change itself is unevenly distributed; an old disparity that stayed as it was passes."""
        return decide(self.tests)

    def _raw(self, names: list[str], metric: str, target: int, seed: int, draws: int) -> Iterator[Test]:
        """One test for each combination of control values, before the correction."""
        kept = self.groups.keep(names)
        pairs = self.groups.marginal(self.pairs, names)[:, target]
        changes = np.stack(CHANGES[metric](pairs))
        present = pairs.sum(axis=(1, 2, 3)) > 0
        labels = [as_tuple(label) for label in kept.index]
        target_name = str(self.names[target]) if len(self.names) > 1 and self.pairs.shape[1] > 1 else ""
        controls, attribute = kept.controls, " x ".join(names)
        width = kept.size // math.prod(kept.shape[:controls])
        for start in range(0, kept.size, width):
            cells = [cell for cell in range(start, start + width) if present[cell]]
            if cells:
                groups = [unwrapped(labels[cell][controls:]) for cell in cells]
                rng = np.random.default_rng([self.random_state, seed, start])
                found = tested_change(changes[:, cells], groups, metric, self.gate.min_count, draws, rng)
                yield replace(
                    found, attribute=attribute, metric=metric, target=target_name, control=labels[start][:controls]
                )


def _judged(test: Test, adjusted: float, gate: Gate) -> Test:
    disparity = test.gap > gate.tolerance and adjusted <= gate.alpha
    outliers = test.outliers if disparity else ()
    return replace(
        test, metric=f"{test.metric}_change", p_adjusted=adjusted, disparity=disparity, outliers=outliers
    )  # fmt: skip
