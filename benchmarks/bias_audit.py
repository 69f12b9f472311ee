"""What the bias audit costs and whether its verdicts hold: against fairlearn, pandas, and the truth of planted data."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bias_audit_overhead import overhead
from bias_audit_planted import planted
from bias_audit_tabular import DATA_SETS, end_to_end
from fairlearn.metrics import MetricFrame, false_negative_rate, false_positive_rate, selection_rate, true_positive_rate
from measure import Row, interleaved, show, write
from rich.progress import track
from sklearn.metrics import accuracy_score

from groundwire_bias_audit import Gate, Verdict, audit
from groundwire_bias_audit.audit.intervals import bootstrap
from groundwire_bias_audit.audit.rates import confusion_counts, disaggregate

METRICS = {
    "accuracy": accuracy_score,
    "selection_rate": selection_rate,
    "true_positive_rate": true_positive_rate,
    "false_positive_rate": false_positive_rate,
    "false_negative_rate": false_negative_rate,
}
NAMES = tuple(METRICS)
AGGREGATES: dict[str, Callable[[MetricFrame], object]] = {
    "by_group": lambda frame: frame.by_group,
    "overall": lambda frame: frame.overall,
    "group_min": lambda frame: frame.group_min(),
    "group_max": lambda frame: frame.group_max(),
    "difference": lambda frame: frame.difference(),
    "difference_to_overall": lambda frame: frame.difference(method="to_overall"),
    "ratio": lambda frame: frame.ratio(),
    "ratio_to_overall": lambda frame: frame.ratio(method="to_overall"),
}


def table(rows: int, groups: int, seed: int = 0):
    """Labels, predictions that are right in four of five rows, and group numbers."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, rows)
    return y, np.where(rng.random(rows) < 0.8, y, 1 - y), rng.integers(0, groups, rows)


def seconds(call: Callable[[], object]) -> float:
    """Of the processor, all threads together, for one call: other programs on the machine do not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def fairlearn(y, p, g, **options):
    """Everything that MetricFrame derives."""
    frame = MetricFrame(metrics=METRICS, y_true=y, y_pred=p, sensitive_features=g, **options)
    return {name: value(frame) for name, value in AGGREGATES.items()}


def speed(repeats: int, rows: int = 1_000_000, groups: int = 10) -> list[Row]:
    """Equality with fairlearn, and time relative to fairlearn and to counting with pandas."""
    y, p, g = table(rows, groups)
    text = np.array([f"group {i}" for i in range(groups)])[g]
    words, objects = pd.Series(text), text.astype(object)
    forms = {"integers": g, "strings": words, "objects": pd.Series(objects, dtype=object)}
    frames = {kind: pd.DataFrame({"g": v, "y": y, "p": p}) for kind, v in forms.items()}

    def counted():
        return disaggregate(confusion_counts(g, y, p, groups), NAMES)

    def audited(form=words):
        result = audit(y, y_pred=p, sensitive_features=form)
        return result.to_frame(), result.summary(), result.verdict

    def grouped(kind):
        return frames[kind].groupby(["g", "y", "p"]).size()

    ours, theirs = counted(), fairlearn(y, p, g)
    difference = max(float(np.abs(ours[m][a] - np.asarray(theirs[a][m])).max()) for m in NAMES for a in AGGREGATES)
    result = audit(y, y_pred=p, sensitive_features=words)
    strings = fairlearn(y, p, words)
    end = float((result.to_frame()[list(NAMES)] - strings["by_group"]).abs().to_numpy().max())
    for name in list(AGGREGATES)[1:]:
        end = max(end, float((result.summary()[name][list(NAMES)] - strings[name]).abs().max()))
    ways = {
        "fairlearn": lambda: seconds(lambda: fairlearn(y, p, g)),
        "fairlearn strings": lambda: seconds(lambda: fairlearn(y, p, words)),
    }
    slow = interleaved("MetricFrame", max(1, repeats // 4), ways)
    fast = interleaved(
        "counting",
        4 * repeats,
        {
            "counts": lambda: seconds(counted),
            "audit": lambda: seconds(audited),
            "audit objects": lambda: seconds(lambda: audited(objects)),
            "audit text": lambda: seconds(lambda: audited(text)),
            "pandas": lambda: seconds(lambda: grouped("integers")),
            "pandas strings": lambda: seconds(lambda: grouped("strings")),
            "pandas objects": lambda: seconds(lambda: grouped("objects")),
        },
    )
    many, few = np.array(slow["fairlearn"]), np.array(slow["fairlearn strings"])
    return [
        Row("difference to fairlearn, 1 M rows", "", [difference], 0.0),
        Row("difference to fairlearn, audit() from strings", "", [end], 0.0),
        Row("counts and all outputs / fairlearn", "", list(np.array(fast["counts"]) / np.median(many)), 1 / 1000),
        Row("counts and all outputs / pandas", "", _ratios(fast["counts"], fast["pandas"]), 1 / 4),
        Row("audit() from strings / fairlearn", "", list(np.array(fast["audit"]) / np.median(few)), 1 / 200),
        Row("audit() from strings / pandas", "", _ratios(fast["audit"], fast["pandas strings"]), 1.0),
        Row("audit() from object strings / pandas", "", _ratios(fast["audit objects"], fast["pandas objects"]), 1.0),
        # pandas has no column of fixed-width text; the conversion to its strings is not counted.
        Row("audit() from a <U array / pandas", "", _ratios(fast["audit text"], fast["pandas strings"]), 1.0),
        Row("counts and all outputs", "ms", [1000 * t for t in fast["counts"]]),
        Row("audit() from strings", "ms", [1000 * t for t in fast["audit"]]),
        Row("fairlearn", "s", list(many)),
    ]


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]


def resampling(repeats: int, rows: int = 5000, groups: int = 10, draws: int = 100) -> list[Row]:
    """Intervals: time, and their distance from fairlearn's relative to that between two seeds of fairlearn."""
    y, p, g = table(rows, groups)
    q = [0.025, 0.975]

    def theirs(seed: int):
        frame = MetricFrame(
            metrics=METRICS, y_true=y, y_pred=p, sensitive_features=g, n_boot=draws, ci_quantiles=q, random_state=seed
        )
        return frame.by_group_ci, frame.difference_ci(), frame.ratio_ci(), frame.group_min_ci(), frame.group_max_ci()

    def ours(seed: int):
        counts = confusion_counts(g, y, p, groups)
        return bootstrap(counts, NAMES, n_boot=draws, ci_quantiles=q, random_state=seed)

    seeds = range(max(2, repeats // 2))
    slow, fast, intervals = [], [], []
    for seed in track(seeds, "bootstrap", transient=True):
        slow.append(seconds(lambda s=seed: intervals.append(theirs(s))))
        fast += [seconds(lambda s=seed: ours(s)) for _ in range(5)]
    reference = [np.array([np.asarray(frame[list(NAMES)]) for frame in by_group]) for by_group, *_ in intervals]
    own = [np.stack([ours(seed)[name]["by_group"] for name in NAMES], axis=-1) for seed in seeds]
    pairs = [(a, b) for a in seeds for b in seeds if a < b]
    noise = float(np.mean([np.abs(reference[a] - reference[b]).mean() for a, b in pairs]))
    apart = [float(np.abs(own[a] - reference[b]).mean()) / noise for a in seeds for b in seeds]
    return [
        Row("100 bootstrap draws / fairlearn", "", list(np.array(fast) / np.median(slow)), 1 / 1000),
        Row("distance of intervals / fairlearn's own noise", "", apart, 1.25),
    ]


def verdicts(draws: int, gap: float = 0.0) -> dict[tuple[int, int], tuple[int, int]]:
    """How often a disparity is found in ``draws`` data sets, by number and size of groups; and insufficient ones.

    The model is right in 80 % of the rows of every group; the first group's share is lower by ``gap``.
    """
    found = {}
    settings = [(groups, size) for groups in (2, 5, 10, 20, 40) for size in (100, 200, 500)]
    for groups, size in track(settings, f"gate, true gap {gap:g}", transient=True):
        names = [simulated(groups, size, gap, seed) for seed in range(draws)]
        found[groups, size] = names.count(Verdict.DISPARITY), names.count(Verdict.INSUFFICIENT)
    return found


def simulated(groups: int, size: int, gap: float, seed: int) -> Verdict:
    """The verdict on one data set."""
    rng = np.random.default_rng([seed, groups, size])
    g = np.repeat(np.arange(groups), size)
    y = rng.integers(0, 2, len(g))
    right = rng.random(len(g)) < np.where(g == 0, 0.8 - gap, 0.8)
    return audit(y, y_pred=np.where(right, y, 1 - y), sensitive_features=g, gate=Gate()).verdict


def gate(draws: int) -> list[Row]:
    """False alarms on a fair model, and power."""
    fair = verdicts(draws)
    alarms = [count for count, _ in fair.values()]
    total = 100 * sum(alarms) / (draws * len(alarms))
    # The 99 % point of a binomial of level 5 %, as 31 of 400.
    limit = 31 if draws == 400 else round(0.05 * draws + 2.6 * (0.05 * 0.95 * draws) ** 0.5)
    rows = [
        Row(f"false alarms of {draws}, worst setting", "", [max(alarms)], limit),
        Row("false alarms over all settings", "%", [total], 5.5),
    ]
    for gap in (0.05, 0.1):
        for (groups, size), (count, _) in verdicts(max(2, draws // 4), gap).items():
            name = f"power, true gap {gap:g}, {groups} groups x {size}"
            rows.append(Row(name, "%", [100 * count / max(2, draws // 4)]))
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, draws and seeds: under two minutes")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with COMPAS and German credit as CSV files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values of all repeats")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--report", type=Path, metavar="DIR", help="keep the reports of --data here")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore",
        ".*(LeafSpec|does not have many workers|GPU available|sampler has shuffling|smaller than the logging).*",
    )
    torch.set_num_threads(1)
    found = [row for part in PARTS if part in options.only for row in PARTS[part](options)]
    rows = [replace(row, values=[float(value) for value in row.values]) for row in found]
    show(rows)
    if options.json is not None:
        write(options.json, rows, quick=options.quick)
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "speed": lambda o: speed(1, 1_000) if o.tiny else speed(1, 500_000) if o.quick else speed(12),
    "bootstrap": lambda o: resampling(2, 500, 3, 10) if o.tiny else resampling(1 if o.quick else 8),
    "gate": lambda o: gate(2 if o.tiny else 20 if o.quick else 400),
    "planted": lambda o: planted(1, 1, 1) if o.tiny else planted(1, 12, 20) if o.quick else planted(3, 20, 200),
    "overhead": lambda o: overhead(1, 2, 4) if o.tiny else overhead(1, 60, 4) if o.quick else overhead(6),
    "tabular": lambda o: [] if o.data is None else end_to_end(o.data, o.report, 2 if o.quick else 10),
}
assert DATA_SETS

if __name__ == "__main__":
    main()
