"""The pictures of an audit; every name is drawn as it is, never read as a formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.audit.record import AuditRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Most groups in one picture; the smallest are left out beyond it.
MOST = 24


def label(value: Any, most: int = 28) -> str:
    r"""A group's name, without mathematics and not too long.

    Example:
        >>> label(("f", "$x$"))
        'f, \\$x\\$'
    """
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace("\\", "\\\\").replace("$", "\\$") if "$" in text else text


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure  # only when something is drawn

    return Figure(figsize=size, layout="constrained")


def group_bars(result: AuditRecord, feature: str, metrics: Sequence[str]) -> Figure:
    """Metrics of each group of ``feature`` as points with bootstrap intervals, and the overall value as a line."""
    target = result.targets[0] if result.task == "multilabel" else None
    frame, intervals = result.to_frame([feature], target=target), result.intervals([feature], target=target)
    frame = frame.sort_values("count", ascending=False).head(MOST).sort_index()
    overall = result.to_frame([], target=result.targets[0] if result.task == "multilabel" else None)
    figure = _figure((2.6 * len(metrics) + 1.4, 0.34 * len(frame) + 1.5))
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics), sharey=True)), metrics, strict=True):
        y = np.arange(len(frame))
        value = frame[metric].to_numpy()
        if metric in intervals:
            low, high = (intervals[metric].loc[frame.index].iloc[:, i].to_numpy() for i in (0, -1))
            axes.hlines(y, low, high, color="#7aa6d8", linewidth=5, alpha=0.7)
        axes.plot(value, y, "o", color="#1f5fbf")
        if len(overall) == 1 and not np.isnan(overall[metric].iloc[0]):
            axes.axvline(overall[metric].iloc[0], color="#888888", linewidth=1, linestyle="--")
        axes.set(xlabel=metric.replace("_", " "), yticks=y)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticklabels([f"{label(g)} ({n})" for g, n in zip(frame.index, frame["count"], strict=True)])
    figure.suptitle(f"By {label(feature)} (rows)")
    return figure


def curves(results: Mapping[str, AuditRecord], feature: str, metric: str = "accuracy") -> Figure:
    """``metric`` of each group over the variants of the model."""
    target = {name: r.targets[0] if r.task == "multilabel" else None for name, r in results.items()}
    table = pd.DataFrame({name: r.to_frame([feature], target=target[name])[metric] for name, r in results.items()})
    figure = _figure((6.4, 3.6))
    axes = figure.subplots()
    x = np.arange(len(table.columns))
    for group, values in table.head(MOST).iterrows():
        axes.plot(x, values, marker="o", label=label(group))
    axes.set(
        xticks=x, xlabel="variant of the model", ylabel=metric, title=f"{metric} of each group of {label(feature)}"
    )
    axes.set_xticklabels([label(name, 14) for name in table.columns])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    return figure


def confusion_by_confidence(result: AuditRecord, feature: str) -> Figure:
    """Shares of TP, FN, FP and TN in each group, certain and uncertain."""
    frame = result.confidence([feature], target=result.targets[0]).head(MOST)
    shares = frame.div(frame.sum(axis=1).replace(0, np.nan), axis=0)
    figure = _figure((7.0, 0.34 * len(frame) + 1.7))
    axes = figure.subplots()
    colours = {"TP": "#2a7f3f", "TN": "#1f5fbf", "FP": "#b3541e", "FN": "#a81e1e"}
    left = np.zeros(len(frame))
    for kind, sure in shares.columns:
        value = shares[kind, sure].fillna(0).to_numpy()
        alpha = 1.0 if sure == "certain" else 0.45
        axes.barh(np.arange(len(frame)), value, left=left, color=colours[kind], alpha=alpha, label=f"{kind} {sure}")
        left += value
    axes.set(yticks=np.arange(len(frame)), xlabel="share of rows", title=f"Confusion by confidence, {label(feature)}")
    axes.set_yticklabels([label(group) for group in frame.index])
    axes.legend(fontsize="x-small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


def image_row(images: Sequence[Any], titles: Sequence[str], name: str) -> Figure:
    """Images side by side, each with a title of its own."""
    figure = _figure((1.25 * max(len(images), 4), 1.9))
    for axes, image, title in zip(np.atleast_1d(figure.subplots(1, len(images))), images, titles, strict=True):
        _image(axes, image, title)
    figure.suptitle(name, fontsize=9)
    return figure


def confusion_examples(images: Mapping[tuple[str, str], Sequence[tuple[Any, str]]]) -> Figure:
    """A few samples of TP, FN, FP and TN, certain on the left and uncertain on the right."""
    kinds, sides = (list(dict.fromkeys(cell[i] for cell in images)) for i in (0, 1))
    most = max(map(len, images.values()))
    figure = _figure((1.05 * most * len(sides) + 0.4, 1.35 * len(kinds) + 0.3))
    grid = figure.subplots(len(kinds), most * len(sides), squeeze=False)
    for (kind, side), found in images.items():
        for i in range(most):
            axes = grid[kinds.index(kind), sides.index(side) * most + i]
            if i < len(found):
                _image(axes, found[i][0], f"{kind} {side}\n{found[i][1]}")
            axes.set_axis_off()
    figure.suptitle("Samples of the confusion by confidence: id, P(y=1), groups", fontsize=9)
    return figure


def attribution_pairs(
    images: Sequence[Any], maps: Sequence[tuple[Any, Any]], titles: Sequence[str], name: str
) -> Figure:
    """Each sample above the model's attribution and the variant's; red raises the attributed score, blue lowers it."""
    figure = _figure((1.25 * max(len(images), 4) + 0.4, 4.2))
    grid = figure.subplots(3, len(images), squeeze=False)
    for column, (image, pair, title) in enumerate(zip(images, maps, titles, strict=True)):
        _image(grid[0, column], image, title)
        for axes, values, whose in zip(grid[1:, column], pair, ("the model", "the variant"), strict=True):
            top = float(np.abs(values).max()) or 1.0
            axes.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top)
            axes.set_title(whose, fontsize=7)
            axes.set_axis_off()
    figure.suptitle(name, fontsize=9)
    return figure


def _image(axes: Any, image: Any, title: str) -> None:
    axes.imshow(image, cmap="gray" if np.ndim(image) == 2 else None)
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()
