"""CrAM's part of the report page."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from groundwire import Finding, Section, Table

if TYPE_CHECKING:
    from groundwire_cram.callback import CrAM


def section(cram: CrAM, findings: list[Finding]) -> Section:
    """Settings as text; the latest evaluation of the pruned versions as a table and a curve per metric."""
    levels = ", ".join(f"{100 * s:g} %" for s in cram.sparsities)
    text = (
        f"Trained with {'CrAM+' if cram.plus else 'CrAM'} at sparsities {levels}, rho {cram.rho:g}"
        f"{', sparse gradients' if cram.sparse_grad else ''}. A pruned version is the model with its smallest weights "
        "set to zero, without any retraining."
    )
    results = latest(findings, cram.name)
    tables = [
        Table(f"{metric} after one-shot pruning", ("sparsity", metric), list(values.items()))
        for metric, values in results.items()
    ]
    figures = [partial(curve, metric, values) for metric, values in results.items()]
    return Section("CrAM: one-shot pruning", text, tables, figures)


def latest(findings: list[Finding], name: str = "cram") -> dict[str, dict[str, float]]:
    """Value by sparsity for each metric, of the last epoch in which it was measured.

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
    """A matplotlib figure of ``metric`` over sparsity."""
    from matplotlib.figure import Figure

    points = sorted((0.0 if label == "dense" else float(label.split()[0]), value) for label, value in values.items())
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([100 * s for s, _ in points], [v for _, v in points], marker="o")
    axes.set(xlabel="weights set to zero (%)", ylabel=metric, title=f"{metric} after one-shot pruning")
    axes.grid(visible=True, alpha=0.3)
    return figure
