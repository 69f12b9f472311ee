"""CrAM's part of the report page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from groundwire import Finding, Section, Table
from groundwire_cram.prunable import Prunability
from groundwire_cram.settings import Settings
from groundwire_cram.variants import described


def section(
    settings: Settings, findings: list[Finding], parameters: Sequence[Prunability], plugin: str = "cram"
) -> Section:
    """Return the settings as text; the latest evaluation of the pruned versions as a table and a curve per metric.

    A last table tells what stays dense and why.
    """
    trained_for = ", ".join(described(str(operator)) for operator in settings.operators)
    text = (
        f"Trained with {'CrAM+' if settings.plus else 'CrAM'} for: {trained_for}; "
        f"rho {settings.rho:g}{' times the normalised gradient' if settings.grad_norm else ''}"
        f"{', sparse gradients' if settings.sparse_grad else ''}. A compressed version is the model with its weights "
        "changed so in one shot, without any retraining."
    )
    results = latest(findings, plugin)
    tables = [
        Table(f"{metric} after one-shot compression", ("version", metric), list(values.items()))
        for metric, values in results.items()
    ]
    reasons: dict[str, list[str]] = {}
    for row in parameters:
        if not row.pruned:
            reasons.setdefault(row.reason, []).append(row.name)
    left = [(reason, len(names), ", ".join(names)) for reason, names in reasons.items()]
    tables.append(Table("Parameters that stay dense", ("reason", "parameters", "names"), left))
    figures = [partial(curve, metric, values) for metric, values in results.items()]
    return Section("CrAM: one-shot compression", text, tables, figures)


def latest(findings: list[Finding], name: str = "cram") -> dict[str, dict[str, float]]:
    """Return the value by sparsity for each metric, of the last epoch in which it was measured.

    Example:
        >>> latest([Finding("cram", "acc@0.9", "info", 0.8, ""), Finding("cram", "acc@0.9", "info", 0.9, "", epoch=1)])
        {'acc': {'0.9': 0.9}}
    """
    results: dict[str, dict[str, float]] = {}
    for finding in findings:
        metric, at, label = finding.code.rpartition("@")
        if finding.plugin == name and at:
            results.setdefault(metric, {})[label] = finding.value
    return results


def curve(metric: str, values: dict[str, float]) -> Any:
    """Draw ``metric`` over sparsity, or by version."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(ylabel=metric, title=f"{metric} after one-shot compression")
    axes.grid(visible=True, alpha=0.3)
    try:
        points = sorted((0.0 if label == "dense" else float(label.split()[0]), v) for label, v in values.items())
        axes.plot([100 * s for s, _ in points], [v for _, v in points], marker="o")
        axes.set_xlabel("weights set to zero (%)")
    except ValueError:  # other operators than pruning have names that are not fractions
        axes.bar(list(values), list(values.values()))
        axes.set_xlabel("version of the model")
    return figure
