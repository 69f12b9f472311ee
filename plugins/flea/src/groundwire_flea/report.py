"""FLEA's part of the report page."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from groundwire import Section, Table
from groundwire_flea.result import SavedResult

KEPT, DROPPED = "#2c7fb8", "#d95f0e"
COMPONENTS = {"disc": "discrepancy (error)", "disp": "disparity (unfairness)", "disb": "disbalance (group sizes)"}
#: Columns of numbers that fit on the page next to each other.
WIDEST = 6
#: Letters of a source's name in a picture.
LONGEST = 24


def section(result: SavedResult, mode: str) -> Section:
    """The decision in words, a table of the sources, their scores, and the distances between them."""
    dropped = result.named(False)
    fate = {"filter": "left out of training", "weights": "drawn less often", "report": "reported, and trained on"}[mode]
    verb = "was" if len(dropped) < 2 else "were"
    text = (
        "Every two sources were compared: how differently can one classifier err on them, how differently unfair can "
        "it be, and how different are their groups? A source's score q is the distance within which "
        f"{result.n_clean} sources lie, itself included. {sum(result.kept)} of {len(result.kept)} sources were "
        f"kept, for the reasons in the table; {', '.join(map(str, dropped)) or 'none'} {verb} {fate}."
    )
    if mode == "weights":
        text += "\n\nSampling weights carry no guarantee: one manipulated row in a batch can still do harm."
    cautions = [f"{code}: {message}" for code, message, _ in result.cautions]
    figures = [partial(scores_figure, result), partial(distances_figure, result), partial(shares_figure, result)]
    return Section("FLEA: which sources to trust", "\n\n".join([text, *cautions]), tables(result), figures)


def tables(result: SavedResult) -> list[Table]:
    """The report table in parts that a page can show without cutting columns off, with units in their captions."""
    shares = [name for name in result.columns if name.startswith(("P(y=", "P(a="))]
    rows = ["rows", "label gap", *shares]
    parts = {
        "Decision (q: a distance, without unit, from 0 to 3)": ["q", "kept", "why"],
        "Composition of the distances (shares of a distance, from 0 to 1) and significance (q: a distance; p-value: a "
        "probability)": [*(f"{name} share" for name in COMPONENTS), "cross-fitted q", "p-value"],
    }
    for begin in range(0, len(rows), WIDEST):
        caption = (
            "Number of rows, shares of labels y and groups a (from 0 to 1), and label gap (the largest difference of "
            "such a share between groups)"
        )
        parts[f"{caption}, continued {begin // WIDEST}" if begin else caption] = rows[begin : begin + WIDEST]
    return [
        Table(
            caption,
            ("source", *names),
            list(zip(result.sources, *(result.columns[name] for name in names), strict=True)),
        )
        for caption, names in parts.items()
    ]


def scores_figure(result: SavedResult) -> Any:
    """A bar for each source, as long as its score; the colour says whether it was kept."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    order = np.argsort(result.q, kind="stable")[::-1]
    figure = Figure(figsize=(6, 1.2 + 0.32 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    labels = [_short(result.sources[i]) for i in order]
    colours = [KEPT if result.kept[i] else DROPPED for i in order]
    bars = axes.barh(range(len(order)), [result.q[i] for i in order], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(order)), labels)
    axes.margins(x=0.12)
    axes.set(
        xlabel="score q: distance from the majority (no unit, 0 to 3)", title="How far is each source from the others?"
    )
    handles = [Patch(color=KEPT, label="kept"), Patch(color=DROPPED, label="suppressed")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)  # on the axes it would cover bars
    return figure


def distances_figure(result: SavedResult) -> Any:
    """The matrix D as a heatmap, kept sources first."""
    from matplotlib.figure import Figure

    order = np.argsort(~np.array(result.kept), kind="stable")
    values = np.array(result.distances)[np.ix_(order, order)]
    names = [_short(result.sources[i]) for i in order]
    size = 2.2 + 0.45 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="YlOrBr", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    if len(names) <= 15:
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if value > 0.6 * values.max() else "black"  # the map darkens towards its end
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    border = sum(result.kept) - 0.5
    if border < len(names) - 0.5:
        axes.axhline(border, color="black")
        axes.axvline(border, color="black")
    axes.set_title("Distance between each two sources (kept ones first)")
    figure.colorbar(image, shrink=0.8, label="distance D (no unit, 0 to 3)")
    return figure


def shares_figure(result: SavedResult) -> Any:
    """A bar for each source with the parts that its distances are made of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.6 + 0.32 * len(result.sources)), layout="constrained")
    axes = figure.add_subplot()
    places, left = range(len(result.sources)), np.zeros(len(result.sources))
    for (name, label), colour in zip(COMPONENTS.items(), ("#756bb1", "#31a354", "#969696"), strict=True):
        share = np.array(result.columns[f"{name} share"], dtype=float)
        axes.barh(places, share, left=left, label=label, color=colour)
        left = left + share
    axes.set_yticks(places, [_short(source) for source in result.sources])
    axes.invert_yaxis()
    axes.set(xlabel="share of the distance to the nearest sources (0 to 1)", title="What are the distances made of?")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=1)
    return figure


def _short(source: Any) -> str:
    name = str(source)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
