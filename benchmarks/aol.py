"""AOL against its targets and its peers: soundness, tightness, cost, accuracy.

``--quick`` measures everything at a small size. ``--data DIR`` adds a table on MNIST-format IDX files in DIR.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import aol_fuzz
import aol_timing
import aol_training
import aol_zoo
from aol_rows import Figure, show
from digits import digits, files

PARTS = ("zoo", "fuzz", "peers", "strided", "rescale", "steps", "evaluation", "accumulated", "digits", "data")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one seed: under two minutes")
    parser.add_argument("--json", type=Path, help="write all values here")
    parser.add_argument("--data", type=Path, help="folder with MNIST-format IDX files, plain or .gz")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the trainings")
    parser.add_argument("--epochs", type=int, default=40, help="epochs on digits")
    parser.add_argument("--data-epochs", type=int, default=4, help="epochs on --data")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument(
        "--ways", nargs="+", choices=aol_training.WAYS, default=list(aol_training.WAYS), help="what to train"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    figures: list[Figure] = []
    for part in options.only:
        figures += measure_part(part, options)
        if options.json:
            write(options.json, figures, vars(options))
    show(figures)


def measure_part(part: str, options: argparse.Namespace) -> list[Figure]:
    graphs = {
        "zoo": aol_zoo.soundness,
        "fuzz": aol_fuzz.soundness,
        "peers": aol_zoo.peers,
        "strided": aol_zoo.strided,
    }
    if part in graphs:
        return graphs[part](options.quick)
    if part in ("rescale", "steps", "evaluation", "accumulated"):
        return list(getattr(aol_timing, part)(options.quick))
    return on_digits(options) if part == "digits" else on_files(options)


def on_digits(options: argparse.Namespace) -> list[Figure]:
    seeds, epochs = (1, 1) if options.quick else (options.seeds, options.epochs)
    data = aol_training.as_split(digits(0))
    figures, results = aol_training.table("digits", data, seeds, epochs, options.ways)
    if not {"AOL", "converted stock CNN"} <= results.keys():
        return figures
    audited = [*results["AOL"], *results["converted stock CNN"]]
    figures += aol_training.attacks(audited, data, 20 if options.quick else 500)
    figures += aol_training.roundings({name: results[name] for name in ("AOL", "converted stock CNN")}, data)
    return figures + aol_training.digits_targets(results)


def on_files(options: argparse.Namespace) -> list[Figure]:
    if options.data is None:
        return []
    data = aol_training.as_split(files(options.data, 0, 500 if options.quick else None))
    # 28 pixels do not halve three times.
    data = aol_training.Split(*((torch.nn.functional.pad(x, (2, 2, 2, 2)), y) for x, y in (data.train, data.test)))
    seeds, epochs = (1, 1) if options.quick else (options.seeds, options.data_epochs)
    return aol_training.table(options.data.name, data, seeds, epochs, options.ways)[0]


def write(path: Path, figures: list[Figure], settings: dict[str, object]) -> None:
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    results = [asdict(f) | {"value": f.median, "met": f.met} for f in figures]
    plain = {k: v if isinstance(v, int | float | str | list) else str(v) for k, v in settings.items()}
    path.write_text(json.dumps({"settings": plain, "machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
