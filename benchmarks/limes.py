"""LIMES against the published rule, other forecasters, no correction and the true prior, on streams of real rows."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from limes_cost import cost
from limes_data import TASKS
from limes_simulation import delayed_ways, mean_and_worst, simulate, ways
from measure import Row, show
from rich.console import Console
from rich.progress import track
from rich.table import Table

#: Days of each regime's stream.
DAYS = {"cycle": 10, "weekly": 14, "shift": 8, "walk": 8, "stationary": 8, "random": 8}
LATE = 24
#: Regimes, days and delays of the smallest run: one day more than is left out of the means.
TINY = [("cycle", 3, 0), ("random", 3, 0), ("shift", 4, LATE)]
#: Smallest share of the gap from incremental to oracle that is to be closed, in percent: mean, worst hour.
GAPS = {
    ("digits", "cycle"): (95, 94),
    ("letters", "cycle"): (90, 85),
    ("digits", "weekly"): (92, 90),
    ("letters", "weekly"): (85, 70),
}
#: By how many points LIMES may be below incremental: mean, worst hour.
NEVER_WORSE = {"walk": (0.3, 0.5), "stationary": (0.3, 0.5), "random": (0.3, 0.5)}


def run(job: tuple[str, str, int, int, int]) -> dict[str, Any]:
    """One stream: (task, regime, seed, days, hours that labels come late)."""
    name, regime, seed, days, delay = job
    torch.set_num_threads(1)
    found = simulate(TASKS[name](), regime, seed, days, delayed_ways() if delay else ways(), delay)
    skip = 2 if delay == 0 else 3
    kind = f"{regime}, labels {delay} h late" if delay else regime
    results = {way: mean_and_worst(accuracy, skip) for way, accuracy in found.items()}
    return {"task": name, "regime": kind, "seed": seed, "days": days, "results": results}


def jobs(tasks: Iterable[str], seeds: int, quick: bool, tiny: bool) -> list[tuple[str, str, int, int, int]]:
    if tiny:
        return [("digits", regime, 0, days, delay) for regime, days, delay in TINY]
    if quick:
        pairs = [("digits", "cycle", 6, 0), ("digits", "random", 6, 0), ("letters", "cycle", 4, 0)]
        return [(task, regime, 0, days, delay) for task, regime, days, delay in pairs if task in tasks]
    plain = [(t, r, s, d, 0) for s, t, (r, d) in itertools.product(range(seeds), tasks, DAYS.items())]
    late = [(t, r, s, 12, LATE) for s, t, r in itertools.product(range(seeds), tasks, ("shift",))]
    return plain + late


def simulated(
    wanted: Sequence[tuple[str, str, int, int, int]], processes: int, partial: Path | None
) -> list[dict[str, Any]]:
    """All streams, some at a time; what is done is written to ``partial`` as it comes."""
    found = []
    with contextlib.ExitStack() as stack:
        if processes == 1:
            results = map(run, wanted)
        else:
            pool = multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=8)
            results = stack.enter_context(pool).imap(run, wanted)
        for result in track(results, "streams", total=len(wanted), transient=True):
            found.append(result)
            if partial is not None:
                partial.write_text(json.dumps(found) + "\n")
    return found


def means(found: list[dict[str, Any]], task: str, regime: str) -> dict[str, list[tuple[float, float]]]:
    """(mean, worst hour) of each way by seed."""
    rows = [f["results"] for f in found if (f["task"], f["regime"]) == (task, regime)]
    return {way: [tuple(r[way]) for r in rows] for way in rows[0]} if rows else {}


def gap_closed(values: dict[str, list[tuple[float, float]]], way: str, which: int) -> list[float]:
    """Share of the gap from incremental to oracle, in percent: of the means over seeds, then of each seed."""
    triples = [[v[which] for v in values[name]] for name in (way, "incremental", "oracle")]
    ours, low, high = map(statistics.mean, triples)
    each = [100 * (a - b) / (c - b) for a, b, c in zip(*triples, strict=True)]
    return [100 * (ours - low) / (high - low), *each]


def table(found: list[dict[str, Any]], task: str, regime: str) -> Table:
    """Every way of one task and regime."""
    values = means(found, task, regime)
    seeds = len(values["oracle"])
    shown = Table(
        "", "mean", "sd", "worst hour", "sd", "gap closed, mean", "worst", title=f"{task}, {regime} ({seeds} seeds)"
    )
    for way, pairs in values.items():
        cells = []
        for which in (0, 1):
            numbers = [p[which] for p in pairs]
            cells += [f"{statistics.mean(numbers):.2f}", f"{statistics.pstdev(numbers):.2f}"]
        shares = [f"{gap_closed(values, way, which)[0]:.0f} %" for which in (0, 1)]
        shown.add_row(way, *cells, *shares)
    return shown


def figures(found: list[dict[str, Any]]) -> list[tuple[str, str, str, str, bool | None]]:
    """Each promise: what, target, measured, spread over seeds, met."""
    rows = []
    for task, regime in sorted({(f["task"], f["regime"]) for f in found}):
        values = means(found, task, regime)
        if (task, regime) in GAPS:
            for which, kind in enumerate(("mean", "worst hour")):
                total, *each = gap_closed(values, "LIMES", which)
                published = gap_closed(values, "published rule", which)[0]
                target = GAPS[task, regime][which]
                text = f"{total:.1f} % (published rule {published:.0f} %)"
                rows.append(
                    (f"gap closed, {task} {regime}, {kind}", f">= {target} %", text, spread(each), total >= target)
                )
            rows.append(order(values, f"{task} {regime}"))
        elif regime in NEVER_WORSE:
            for which, kind in enumerate(("mean", "worst hour")):
                each = [a[which] - b[which] for a, b in zip(values["LIMES"], values["incremental"], strict=True)]
                rule = [
                    a[which] - b[which] for a, b in zip(values["published rule"], values["incremental"], strict=True)
                ]
                least, mean = -NEVER_WORSE[regime][which], statistics.mean(each)
                text = f"{mean:+.2f} points (published rule {statistics.mean(rule):+.2f})"
                rows.append(
                    (f"against incremental, {task} {regime}, {kind}", f">= {least}", text, spread(each), mean >= least)
                )
        elif "late" in regime:
            rows += late_figures(values, f"{task} {regime}")
    return rows


def order(values: dict[str, list[tuple[float, float]]], what: str) -> tuple[str, str, str, str, bool | None]:
    names = ("LIMES", "incremental", "ensemble of 24", "restart")
    numbers = [statistics.mean(v[0] for v in values[name]) for name in names]
    met = all(a > b for a, b in itertools.pairwise(numbers))
    return (
        f"order, {what}",
        "LIMES > incremental > ensemble > restart",
        " > ".join(f"{n:.1f}" for n in numbers),
        "",
        met,
    )


def late_figures(
    values: dict[str, list[tuple[float, float]]], what: str
) -> list[tuple[str, str, str, str, bool | None]]:
    gated, plain = "LIMES, unlabelled=True", "LIMES"
    fixed = [name for name in values if name not in ("oracle", gated, plain)]
    return [
        against_best(values, gated, fixed, f"best fixed choice, {what}"),
        against_best(values, plain, [n for n in fixed if "EM" not in n], f"best forecaster without EM, {what}"),
        above_incremental(values, gated, what),
        above_incremental(values, plain, what),
    ]


def against_best(
    values: dict[str, list[tuple[float, float]]], way: str, others: Sequence[str], what: str
) -> tuple[str, str, str, str, bool | None]:
    best = max(others, key=lambda name: statistics.mean(v[0] for v in values[name]))
    below = [o[0] - v[0] for o, v in zip(values[way], values[best], strict=True)]
    mean = statistics.mean(below)
    return (f"{way} against the {what}", ">= -0.5", f"{mean:+.2f} points ({best})", spread(below), mean >= -0.5)


def above_incremental(
    values: dict[str, list[tuple[float, float]]], way: str, what: str
) -> tuple[str, str, str, str, bool | None]:
    above = [o[0] - v[0] for o, v in zip(values[way], values["incremental"], strict=True)]
    mean = statistics.mean(above)
    return (f"{way} against incremental, {what}", "> 0", f"{mean:+.2f} points", spread(above), mean > 0)


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def show_figures(rows: Iterable[tuple[str, str, str, str, bool | None]], console: Console) -> None:
    shown = Table("figure", "target", "measured", "over seeds", "met")
    for *cells, met in rows:
        shown.add_row(*cells, {None: "", True: "yes", False: "NO"}[met])
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed of three short streams, and the cost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values of all seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--task", choices=[*TASKS], action="append", help="only this task")
    parser.add_argument("--jobs", type=int, default=1, help="streams at a time")
    parser.add_argument("--only", choices=["streams", "cost"], help="only this part")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console = Console(width=150)
    found: list[dict[str, Any]] = []
    if options.only != "cost":
        wanted = jobs(options.task or TASKS, options.seeds, options.quick, options.tiny)
        found = simulated(wanted, options.jobs, options.json)
        for task, regime in dict.fromkeys((f["task"], f["regime"]) for f in found):
            console.print(table(found, task, regime))
        show_figures(figures(found), console)
    rows: list[Row] = []
    if options.only != "streams":
        rows = cost(1, 8) if options.tiny else cost(3 if options.quick else 11, 400)
        show(rows)
    if options.json is not None:
        costs = [{"what": r.what, "values": list(r.values), "target": r.target, "met": r.met} for r in rows]
        named = ("figure", "target", "measured", "over_seeds", "met")
        summary = [dict(zip(named, row, strict=True)) for row in figures(found)]
        options.json.write_text(json.dumps({"streams": found, "figures": summary, "cost": costs}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
