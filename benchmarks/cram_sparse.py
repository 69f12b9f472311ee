"""What `sparsify` gains for pruned square Linear layers, beside dense and torch's own ways, on one thread."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Row, short, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from groundwire_cram.sparse import sparsify, sparsity_report

SIZES, BATCHES, SPARSITIES = (1024, 2048, 4096), (1, 8, 32, 128), (0.8, 0.9, 0.95)
QUICK = ((1024, 2048), (1, 32), (0.8, 0.95))
#: Speed-ups aimed at, by sparsity; for one row from 2048 inputs on, below that not slower than dense.
TARGETS = {0.8: 1.2, 0.9: 2.4, 0.95: 4.0}
UNIT = "of dense time"
ROUNDS = 15


def measure(quick: bool = False) -> list[Row]:
    """Time of each way divided by that of the dense layer in the same round; target: 1 / the speed-up aimed at."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            configurations = list(itertools.product(*(QUICK if quick else (SIZES, BATCHES, SPARSITIES))))
            return [row for c in track(configurations, "sparse Linear", transient=True) for row in linear(*c)]
    finally:
        torch.set_num_threads(threads)


def linear(n: int, batch: int, sparsity: float) -> list[Row]:
    """One layer with randomly placed zeros, as magnitude pruning of independent weights leaves them."""
    torch.manual_seed(n + batch)
    dense = nn.Linear(n, n).eval()
    dense.weight[torch.rand(n, n) < sparsity] = 0
    x = torch.randn(batch, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparsify warns where nothing became sparse; the table says so here.
        ours = sparsify(dense, x, progress=False)
        csr = dense.weight.detach().to_sparse_csr()
    torch.testing.assert_close(ours(x), dense(x), rtol=1e-3, atol=1e-4)
    decision = sparsity_report(ours)[""].decision
    if decision == "dense":
        ours = dense  # The layer itself, so that its row shows the noise and not where a copy of it lies in memory.
    ways: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(x),
        f"sparsify ({decision})": lambda: ours(x),
        "F.linear(x, csr)": lambda: F.linear(x, csr, dense.bias),
    }
    seconds = in_turn(ways)
    wanted = TARGETS[sparsity] if batch > 1 or n >= 2048 else 1.0
    rows = []
    for way in list(ways)[1:]:
        ratios = [a / b for a, b in zip(seconds[way], seconds["dense"], strict=True)]
        # A layer that stayed dense can only miss a gain.
        aimed = way.startswith("sparsify") and (wanted > 1 or decision != "dense")
        target = 1 / wanted if aimed else None
        rows.append(Row(f"n={n} batch={batch} zeros={100 * sparsity:g} % | {way}", UNIT, ratios, target))
    return rows


def in_turn(ways: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of a call, round by round; in each round every way runs for some milliseconds, every other backwards."""
    calls = {}
    for name, way in ways.items():
        way()
        calls[name] = max(1, round(5e-3 / seconds_of(way, 1)))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            ways[name]()  # Each finds the caches as its own calls leave them.
            found[name].append(seconds_of(ways[name], calls[name]))
    return found


def seconds_of(way: Callable[[], Any], calls: int) -> float:
    """Of this thread, the only one; its time stands still while other programs have the processor."""
    start = time.thread_time()
    for _ in range(calls):
        way()
    return (time.thread_time() - start) / calls


def show(rows: Sequence[Row]) -> None:
    """As speed-ups, because that is what people ask for."""
    table = Table(
        "layer", "way", "median", "slowest", "fastest", "target", "met", title="speed-up over dense, 1 thread"
    )
    for row in rows:
        layer, way = row.what.split(" | ")
        numbers = (1 / row.median, 1 / max(row.values), 1 / min(row.values))
        target = "" if row.target is None else f">= {1 / row.target:g}"
        table.add_row(layer, way, *map(short, numbers), target, {None: "", True: "yes", False: "NO"}[row.met])
    Console().print(table)
    aimed = [row for row in rows if row.target is not None]
    lowest = max(aimed, key=lambda row: row.median)
    met = sum(bool(row.met) for row in aimed)
    middle = statistics.median(1 / row.median for row in aimed)
    print(f"{met} of {len(aimed)} targets met; median {middle:.2f}; lowest {1 / lowest.median:.2f}: {lowest.what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="eight layers instead of thirty-six")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all values there")
    arguments = parser.parse_args()
    rows = measure(arguments.quick)
    show(rows)
    if arguments.json:
        write(arguments.json, rows, quick=arguments.quick, rounds=ROUNDS)


if __name__ == "__main__":
    main()
