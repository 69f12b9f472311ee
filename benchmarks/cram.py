"""What CrAM costs, what its kernels and sparse layers gain, and how accurate pruned models are."""

from __future__ import annotations

import argparse
import importlib
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
from measure import Row, show, write

PARTS = ("kernels", "steps", "sparse", "accuracy", "text")


def quiet() -> None:
    for name in (pl.__name__, "lightning.fabric"):  # importing Lightning sets their levels
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|GPU available).*")
    warnings.filterwarnings("ignore", ".*(number of training batches|no `val_dataloader`).*")


def measured(part: str, options: argparse.Namespace) -> tuple[Sequence[Row], Callable[[Sequence[Row]], None]]:
    """A part's rows and what shows them. Imported when it runs: one part's peers need not be there for another."""
    module = importlib.import_module(f"cram_{part}")
    arguments = {"accuracy": (options.data, options.seeds), "text": (options.seeds,)}.get(part, ())
    return module.measure(options.quick, *arguments), getattr(module, "show", show)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="everything at its smallest size, within two minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--data", type=Path, help="folder with MNIST-format IDX files, for the same table on them")
    parser.add_argument("--seeds", type=int, help="seeds of the accuracy tables (5 for digits, 3 for the others)")
    parser.add_argument("--json", type=Path, help="write all values there")
    options = parser.parse_args(arguments)
    quiet()
    rows: list[Row] = []
    for part in PARTS:
        if part in options.only:
            found, shown = measured(part, options)
            shown(found)
            rows += found
    if options.json:
        write(options.json, rows, quick=options.quick, parts=list(options.only), seeds=options.seeds)


if __name__ == "__main__":
    main()
