"""Draw the accuracy tables of benchmarks/cram.py: python benchmarks/cram_picture.py results.json docs/cram.svg."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

LEVELS = {"dense": 0.0, "80 %": 80.0, "90 %": 90.0, "95 %": 95.0}


def curves(results: Path, data: str = "digits") -> dict[str, dict[float, list[float]]]:
    """Accuracies by way of training and sparsity."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in json.loads(results.read_text())["results"]:
        name, _, version = row["what"].rpartition(", ")
        if name.startswith(f"{data}, ") and version in LEVELS:
            found.setdefault(name.removeprefix(f"{data}, "), {})[LEVELS[version]] = row["values"]
    return found


def picture(results: Path, target: Path) -> None:
    """Mean and standard deviation over the seeds."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for way, values in curves(results).items():
        means = [statistics.mean(v) for v in values.values()]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values.values()]
        axes.errorbar(list(values), means, spread, marker="o", capsize=3, label=way)
    axes.set(xlabel="weights set to zero in one shot (%)", ylabel="test accuracy (%)")
    axes.set_title("digits: mean and standard deviation over seeds", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]))
