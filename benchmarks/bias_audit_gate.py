"""Does the gate keep its level, and what does it find: simulated audits whose true rates are known.

Counts of right and wrong predictions are drawn, and the verdict is compared with the truth. Next to the gate stand two
others, written here without its code: the withdrawn one (the gap is beyond the tolerance, and an exact permutation test
finds some difference) and plain simultaneous intervals (Newcombe's, Bonferroni over all pairs and rates).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from measure import Row, show, write
from rich.progress import track
from scipy.stats import norm

from groundwire_bias_audit import AuditResult, Gate, Verdict
from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.groups import Groups
from groundwire_bias_audit.audit.hypothesis_tests import adjust, homogeneity


@dataclass(frozen=True)
class Setting:
    """Groups with their rows and the true rate at which they are predicted right, of either label.

    Attributes:
        name: What is shown.
        sizes: Rows of each group.
        rates: True rate of each group.
        min_count: Of the gate.
    """

    name: str
    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    min_count: int = 30

    @property
    def gap(self) -> float:
        return max(self.rates) - min(self.rates)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Confusion counts ``[group, label, prediction]`` of one data set."""
        positive = rng.binomial(self.sizes, 0.5)
        counts = np.empty((len(self.sizes), 2, 2), np.int64)
        for label, rows in ((0, np.array(self.sizes) - positive), (1, positive)):
            right = rng.binomial(rows, self.rates)
            counts[:, label, label], counts[:, label, 1 - label] = right, rows - right
        return counts


def audited(counts: np.ndarray, gate: Gate) -> AuditResult:
    """The audit of confusion counts."""
    groups = Groups(("group",), (tuple(range(len(counts))),))
    return AuditResult(GroupCounts("binary", ("",), groups, counts.sum(axis=(1, 2)), counts[:, None]), gate)


METRICS = ("accuracy", "true_positive_rate", "false_positive_rate")
PARTS = {
    "accuracy": lambda c: (c[:, 0, 0] + c[:, 1, 1], c.sum(axis=(1, 2))),
    "true_positive_rate": lambda c: (c[:, 1, 1], c[:, 1].sum(axis=1)),
    "false_positive_rate": lambda c: (c[:, 0, 1], c[:, 0].sum(axis=1)),
}


def judged(counts: np.ndarray, min_count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Successes and rows of each rate, of the groups with enough rows."""
    found = [PARTS[metric](counts) for metric in METRICS]
    return [(k[n >= min_count], n[n >= min_count]) for k, n in found]


def old_rule(counts: np.ndarray, gate: Gate) -> bool:
    """Withdrawn: gap > tolerance, and equal rates rejected, each by itself."""
    parts = judged(counts, gate.min_count)
    p = [homogeneity(k, n, draws=2000) if len(n) > 1 else np.nan for k, n in parts]
    gaps = [np.ptp(k / n) if len(n) > 1 else 0.0 for k, n in parts]
    return bool((np.array(gaps) > gate.tolerance)[adjust(p) <= gate.alpha].any())


def wilson(k: np.ndarray, n: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Score interval of a rate."""
    middle, half = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    return middle - half, middle + half


def plain_intervals(counts: np.ndarray, gate: Gate) -> bool:
    """Newcombe's two-sided intervals of all differences, by Bonferroni: is one of them beyond the tolerance?"""
    parts = judged(counts, gate.min_count)
    pairs = sum(len(n) * (len(n) - 1) // 2 for _, n in parts)
    z = norm.isf(gate.alpha / max(1, pairs) / 2)
    for k, n in parts:
        p, (low, high) = k / n, wilson(k, n, z)
        difference = p[:, None] - p[None, :]
        reach = np.sqrt((p - low)[:, None] ** 2 + (high - p)[None, :] ** 2)
        if (difference - reach > gate.tolerance).any():
            return True
    return False


def even(groups: int, size: int, rate_: float = 0.8, gap: float = 0.0, **options: int) -> Setting:
    """Groups of one size; half of them better by ``gap``."""
    rates = tuple(rate_ + gap * (i % 2) for i in range(groups))
    return Setting(f"{groups} x {size:,}, rates {rate_:g} to {rate_ + gap:g}", (size,) * groups, rates, **options)


def one_lower(groups: int, size: int, gap: float, rate_: float = 0.8) -> Setting:
    """Groups of one size; the first is worse by ``gap``."""
    return Setting(
        f"{groups} x {size:,}, one lower by {gap:g}", (size,) * groups, (rate_ - gap,) + (rate_,) * (groups - 1)
    )


LARGE = (20_000, 20_000)
#: True gaps within the tolerance of 0.05.
WITHIN = [
    Setting("2 x 20,000 with a gap of 0.02, 1 x 60", (*LARGE, 60), (0.79, 0.81, 0.8)),
    Setting("2 x 20,000 with a gap of 0.02, 4 x 60", (*LARGE, *[60] * 4), (0.79, 0.81, *[0.8] * 4)),
    Setting("2 x 20,000 with a gap of 0.05, 4 x 60", (*LARGE, *[60] * 4), (0.775, 0.825, *[0.8] * 4)),
    Setting("2 x 20,000, 10 x 60, all near 1", (*LARGE, *[60] * 10), (0.95, 1.0, *[0.97] * 10)),
    Setting(
        "10 to 20,000 rows, rates 0.9 and 0.95", (10, 30, 100, 300, 1000, 3000, 10_000, 20_000), (0.9, 0.95) * 4, 10
    ),
    even(2, 10, 0.9, 0.05, min_count=1),
    even(10, 10, 0.95, 0.05, min_count=1),
    even(40, 10, 0.5, 0.05, min_count=1),
    *(even(groups, size, 0.8, gap) for groups in (2, 10, 40) for size in (100, 1000, 20_000) for gap in (0.0, 0.05)),
    even(10, 200, 0.95, 0.05),
    even(40, 100, 0.95, 0.05),
    even(10, 300, 0.5, 0.05),
]
#: True gaps beyond it.
BEYOND = [
    *(one_lower(groups, size, gap) for groups in (2, 3, 10, 40) for size in (300, 1000, 3000) for gap in (0.1, 0.15)),
    one_lower(3, 3000, 0.12),
]


def share(setting: Setting, draws: int, gate: Gate, rules: Sequence[str]) -> dict[str, float]:
    """How often each rule finds a disparity, and how often the gate's statements about the gap are wrong."""
    gate = replace(gate, min_count=setting.min_count)
    found: dict[str, list[bool]] = {rule: [] for rule in (*rules, "pass", "misses")}
    for seed in range(draws):
        counts = setting.draw(np.random.default_rng([seed, len(setting.sizes), *map(ord, setting.name)]))
        result = audited(counts, gate)
        found["gate"].append(result.verdict is Verdict.DISPARITY)
        found["pass"].append(result.verdict is Verdict.PASS)
        if "old" in rules:
            found["old"].append(old_rule(counts, gate))
        if "intervals" in rules:
            found["intervals"].append(plain_intervals(counts, gate))
        if seed < max(1, draws // 4):
            found["misses"].append(misses(result, setting))
    return {rule: float(np.mean(values)) if values else 0.0 for rule, values in found.items()}


def misses(result: AuditResult, setting: Setting) -> bool:
    """Whether a true gap among the judged groups lies outside of what the audit says about it."""
    for test in result.tests:
        true = [setting.rates[group] for group in test.groups]
        if len(true) > 1 and not test.bounds[0] <= max(true) - min(true) + 1e-9 <= test.bounds[1] + 2e-9:
            return True
    return False


def most(draws: int, level: float = 0.05) -> float:
    """The 99.9 % point of a share whose true value is ``level``."""
    return level + 3.1 * (level * (1 - level) / draws) ** 0.5


def levels(draws: int) -> list[Row]:
    """False alarms with true gaps within the tolerance."""
    rows = []
    for setting in track(WITHIN, "level", transient=True):
        found = share(setting, draws, Gate(), ("gate", "old"))
        rows.append(Row(f"false alarms, {setting.name}", "", [found["gate"]], most(draws)))
        rows.append(Row(f"old rule, {setting.name}", "", [found["old"]]))
        rows.append(
            Row(f"wrong statements about the gap, {setting.name}", "", [found["misses"]], most(max(1, draws // 4)))
        )
        if setting.gap == 0:
            rows.append(Row(f"passes, {setting.name}", "", [found["pass"]]))
    return rows


def power(draws: int) -> list[Row]:
    """Disparities found, relative to plain simultaneous intervals."""
    rows = []
    for setting in track(BEYOND, "power", transient=True):
        found = share(setting, draws, Gate(), ("gate", "old", "intervals"))
        noise = 3.1 * (0.25 / draws) ** 0.5
        if setting.name.startswith("3 x 3,000, one lower by 0.12"):
            rows.append(Row(f"power, {setting.name}", "", [found["gate"]], 0.9, at_least=True))
        else:
            least = 0.95 * found["intervals"] - noise
            rows.append(Row(f"power, {setting.name}", "", [found["gate"]], max(0.0, least), at_least=True))
        rows.append(Row(f"plain intervals, {setting.name}", "", [found["intervals"]]))
        rows.append(Row(f"old rule, {setting.name}", "", [found["old"]]))
        rows.append(
            Row(f"wrong statements about the gap, {setting.name}", "", [found["misses"]], most(max(1, draws // 4)))
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Simulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="40 data sets for each setting instead of 400")
    parser.add_argument("--draws", type=int, help="data sets for each setting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values")
    options = parser.parse_args(arguments)
    draws = options.draws or (40 if options.quick else 400)
    rows = levels(draws) + power(draws)
    show(rows)
    if options.json is not None:
        write(options.json, rows, quick=options.quick, draws=draws)
    return rows


if __name__ == "__main__":
    main()
