"""LIMES's findings and its section of the report page."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from groundwire import Finding, Section, Table
from groundwire_limes.extrapolator import PriorExtrapolator
from groundwire_limes.functional import Array
from groundwire_limes.prior_tracker import PriorTracker

#: Steps that are drawn at most; forecasts are computed again for the picture.
DRAWN = 480
#: Classes that are drawn.
TOP = 5
#: Steps that a log-loss is compared over before it is called worse.
ENOUGH = 12


def accuracies(tracker: PriorTracker) -> dict[int, float]:
    """Return the prequential accuracy by step: of each batch before it was learned from."""
    found = {step: tracker.class_counts.quality(step) for step in sorted(tracker.class_counts.known)}
    return {step: q["accuracy"] for step, q in found.items() if "accuracy" in q}


def seasons(by_step: dict[int, float], season: int | None) -> dict[int, list[float]]:
    """Return values of the complete seasons, by season number; without a season, everything is one.

    Example:
        >>> seasons({0: 0.5, 1: 0.7, 2: 0.9, 3: 0.1, 4: 0.0}, 2)
        {0: [0.5, 0.7], 1: [0.9, 0.1]}
    """
    found: dict[int, list[float]] = {}
    for step, value in by_step.items():
        found.setdefault(0 if season is None else step // season, []).append(value)
    return {day: values for day, values in found.items() if season is None or len(values) == season}


def stream_findings(tracker: PriorTracker, season: int | None, notes: list[tuple[str, str]]) -> list[Finding]:
    """Return numbers of the whole stream, and warnings."""
    found = [Finding("limes", code, "warn", True, text) for code, text in notes]
    by_step = accuracies(tracker)
    if not by_step:
        return found
    values: dict[str, tuple[Any, str]] = {}
    values["mean_accuracy"] = np.mean(list(by_step.values())), "Mean accuracy of the steps, before learning."
    if days := seasons(by_step, season):
        worst = np.mean([min(accuracy) for accuracy in days.values()])
        text = f"Accuracy of the worst step of a season, mean of {len(days)} complete seasons."
        values["worst_step_accuracy"] = worst, text
    if over := tracker.finished:
        mean = np.mean([step.divergence for step in over])
        values["divergence"] = mean, "Mean divergence of the forecast, in nats."
        guarded = sum(step.guarded for step in over)
        values["guarded_steps"] = guarded, f"Steps of {len(over)} held near the long-run prior."
    found += [Finding("limes", code, "info", float(value), text) for code, (value, text) in values.items()]
    text = (
        "The weights are for equal classes: predict with LIMES in the Trainer, or bake the forecast in with "
        "groundwire.export."
    )
    return [*found, *_harmful_correction(tracker), Finding("limes", "needs_offset", "info", True, text)]


def _harmful_correction(tracker: PriorTracker) -> list[Finding]:
    """Return warnings if the correction makes predictions worse: something else moves, or it was not learned yet."""
    last = [tracker.class_counts.quality(step) for step in sorted(tracker.class_counts.known)][-24:]
    last = [q for q in last if "loss" in q]
    found = []
    for what, sign in (("accuracy", 1.0), ("loss", -1.0)):
        gains = sign * np.array([q[what] - q[f"uncorrected_{what}"] for q in last])
        if len(gains) >= ENOUGH and gains.mean() + gains.std(ddof=1) / np.sqrt(len(gains)) < 0:
            text = (
                f"In the last {len(gains)} steps the correction made the {what} worse by {-gains.mean():.3f}: the "
                "model has not learned enough yet for its scores to weigh up a prior, the loss is weighted, or it is "
                "not the class mix that moves. Compare with a run without LIMES."
            )
            found.append(Finding("limes", f"correction_hurts_{what}", "warn", float(gains.mean()), text))
    return found


def stream_section(tracker: PriorTracker, training_prior: str, season: int | None) -> Section | None:
    """Return settings, a table of the seasons, and three pictures: accuracy, priors, divergence."""
    by_step = accuracies(tracker)
    if not by_step:
        return None
    days = seasons(by_step, season)
    text = (
        f"Class priors were forecast by {tracker.extrapolator.method!r}; the loss was corrected with the "
        f"{training_prior} prior. Accuracy is prequential: each batch is predicted with the forecast before it is "
        "learned from, by the network as it is in training, dropout included."
    )
    table = Table(
        "Accuracy by season",
        ("season", "mean", "worst step"),
        [(day, float(np.mean(values)), min(values)) for day, values in days.items()],
    )
    figures = [partial(accuracy_figure, by_step), partial(prior_figure, tracker), partial(divergence_figure, tracker)]
    return Section("LIMES: a moving class mix", text, [table] if season and days else [], figures)


def accuracy_figure(by_step: dict[int, float]) -> Any:
    """Draw accuracy over the steps."""
    return _figure(list(by_step), [("accuracy", list(by_step.values()))], "accuracy", "Accuracy before learning")


def divergence_figure(tracker: PriorTracker) -> Any:
    """Draw divergence over the steps, with the guarded ones marked."""
    closed = tracker.finished[-DRAWN:]
    figure = _figure(
        [c.step for c in closed],
        [("divergence", [c.divergence for c in closed])],
        "nats",
        "Divergence of the forecast from the realised prior",
    )
    guarded = [c for c in closed if c.guarded]
    if guarded:
        axes = figure.axes[0]
        axes.plot(
            [c.step for c in guarded], [c.divergence for c in guarded], "o", markersize=3, label="held by the guard"
        )
        axes.legend()
    return figure


def prior_figure(tracker: PriorTracker) -> Any:
    """Draw realised and forecast prior of the most frequent classes."""
    steps, realised, forecast = past_forecasts(tracker)
    top = np.argsort(-realised.mean(axis=0), kind="stable")[:TOP]
    curves = [(f"class {k}", realised[:, k].tolist()) for k in top]
    figure = _figure(steps, curves, "share of labels", "Realised prior (lines) and forecast (dashes)")
    axes = figure.axes[0]
    for drawn, k in zip(axes.get_lines(), top, strict=True):
        axes.plot(steps, forecast[:, k], "--", color=drawn.get_color(), linewidth=1)
    axes.legend(ncols=TOP, fontsize="small")
    return figure


def past_forecasts(tracker: PriorTracker) -> tuple[list[int], Array, Array]:
    """Return steps, realised frequencies and forecasts (T, K) of the last steps, as the history is known now."""
    saved = tracker.extrapolator.state_dict()
    past = len(saved["steps"]) - DRAWN
    twin = PriorExtrapolator(
        saved["num_classes"], **{n: saved[n] for n in ("method", "period", "smoothing", "max_move")}
    )
    rows = []
    for index, (step, counts) in enumerate(zip(saved["steps"], saved["counts"], strict=True)):
        if index >= past:
            rows.append((step, np.asarray(counts) / max(1.0, sum(counts)), twin.forecast(step)))
        twin.update(step, counts)
    steps, realised, forecast = zip(*rows, strict=True)
    return list(steps), np.stack(realised), np.stack(forecast)


def _figure(steps: list[int], curves: list[tuple[str, list[float]]], ylabel: str, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves:
        axes.plot(steps, values, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    axes.grid(visible=True, alpha=0.3)
    return figure
