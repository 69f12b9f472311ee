"""AOL's part of the report page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from groundwire import Section, Table
from groundwire_aol.evaluation import Result


def section(changes: Sequence[str], results: Mapping[str, Result]) -> Section | None:
    """Return what was changed, and for each stage a table, the certified accuracy over the radius, and the radii."""
    if not (changes or results):
        return None
    text = (
        "A prediction is certified at a radius if no input within that distance (L2, in units of pixels) can change "
        "it. The Lipschitz bound was proved for the weights of each pass; nothing here is an estimate."
    )
    if changes:
        text += "\n\nThe model was changed: " + "; ".join(changes) + "."
    tables = [_table(stage, result) for stage, result in results.items()]
    figures = [partial(draw, stage, result) for stage, result in results.items() for draw in (curve, radii)]
    return Section("AOL: certified robustness", text, tables, figures)


def _table(stage: str, result: Result) -> Table:
    rows = [("clean", result.clean), *((f"{eps:.4g}", value) for eps, value in result.certified.items())]
    rounding = "of exact arithmetic" if math.isnan(result.rounding) else f"less {result.rounding:.2g} for rounding"
    caption = (
        f"Accuracy by radius, {stage}: {result.samples} samples, Lipschitz constant at most {result.lipschitz:.7g}, "
        f"radii {rounding}"
    )
    return Table(caption, ("radius", "accuracy"), rows)


def curve(stage: str, result: Result) -> Any:
    """A matplotlib figure of certified accuracy over the radius."""
    figure, axes = _axes()
    axes.plot(*zip(*result.curve, strict=True))
    axes.plot(list(result.certified), list(result.certified.values()), "o")
    axes.set(xlabel="radius (L2)", ylabel="certified accuracy", ylim=(0, 1), title=f"Certified accuracy, {stage}")
    axes.grid(visible=True, alpha=0.3)
    return figure


def radii(stage: str, result: Result) -> Any:
    """A matplotlib histogram of certified radii, that is of margins; wrong predictions lie at 0."""
    figure, axes = _axes()
    points, values = zip(*result.curve, strict=True)
    shares = [1 - values[0], *(a - b for a, b in pairwise(values))]
    width = points[1] - points[0]
    axes.bar([-width / 2], [shares[0]], width, label="wrong")
    axes.bar([p + width / 2 for p in points[:-1]], shares[1:], width, label="right")
    axes.bar([points[-1] + width / 2], [values[-1]], width, label="beyond")
    axes.set(xlabel="certified radius (L2)", ylabel="share of samples", title=f"Certified radii, {stage}")
    axes.legend()
    return figure


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    return figure, figure.add_subplot()
