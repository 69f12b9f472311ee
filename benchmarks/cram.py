"""What CrAM costs, what its kernels and sparse layers gain, and how accurate pruned models are."""

from __future__ import annotations

import argparse
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


def measurements(options: argparse.Namespace) -> dict[str, Callable[[], Sequence[Row]]]:
    """Imported when they run: one part's peers need not be there for another."""

    def kernels():
        import cram_kernels

        return cram_kernels.measure(options.quick)

    def steps():
        import cram_steps

        return cram_steps.measure(options.quick)

    def sparse():
        import cram_sparse

        return cram_sparse.measure(options.quick)

    def accuracy():
        import cram_accuracy

        return cram_accuracy.measure(options.quick, options.data, options.seeds)

    def text():
        import cram_text

        return cram_text.measure(options.quick, options.seeds)

    return {"kernels": kernels, "steps": steps, "sparse": sparse, "accuracy": accuracy, "text": text}


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
    for part, run in measurements(options).items():
        if part in options.only:
            found = list(run())
            show(found)
            rows += found
    if options.json:
        write(options.json, rows, quick=options.quick, parts=list(options.only), seeds=options.seeds)


if __name__ == "__main__":
    main()
