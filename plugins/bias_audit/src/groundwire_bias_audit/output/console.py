"""An audit printed on a terminal."""

from __future__ import annotations

import pandas as pd

from groundwire_bias_audit.audit.gate import Verdict, conclusion, not_gated, verdict_of
from groundwire_bias_audit.audit.groups import with_groups
from groundwire_bias_audit.audit.record import AuditRecord


def show(result: AuditRecord) -> None:
    """Print the verdict, the tests, and the main metrics of the groups."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=120)  # a pipe has no width, and 80 is too little
    colour = {Verdict.PASS: "green", Verdict.DISPARITY: "red", Verdict.INSUFFICIENT: "yellow"}[result.verdict]
    console.print(f"[bold {colour}]{result.verdict}[/] {escape(result.title)}", highlight=False)
    console.print(escape(f"{result.conclusion}."), highlight=False)
    changes = [] if result.comparison is None else result.comparison.tests
    if changes:
        change = conclusion(changes, result.gate)
        console.print(f"[bold]change: {verdict_of(changes)}[/] {escape(change)}.", highlight=False)
    columns = ("feature", "rate", "gap", "at least", "at most", "adjusted P", "stands out", "too few rows")
    gaps = Table(*columns, title="gated gaps" + (" and changes" if changes else ""))
    for test in [*result.tests, *changes]:
        named = [", ".join(map(str, (test.attribute, *test.control))), f"{test.metric} {test.target}".strip()]
        numbers = [f"{test.gap:.3f}", *(f"{end:.3f}" for end in test.bounds), f"{test.p_adjusted:.2g}"]
        lists = [", ".join(map(str, test.outliers)), ", ".join(map(str, test.small))]
        gaps.add_row(*map(escape, (*named, *numbers, *lists)), style="red" if test.disparity else "")
    console.print(gaps)
    console.print(not_gated(result.task, result.gate), highlight=False)
    for feature in result.features:
        shown = _main(result, feature).iloc[:50]
        table = Table(*(escape(str(c).replace("_", " ")) for c in shown.columns))
        for row in shown.itertuples(index=False):
            table.add_row(*(escape(f"{v:.3f}" if isinstance(v, float) else str(v)) for v in row))
        console.print(table)


def _main(result: AuditRecord, feature: str) -> pd.DataFrame:
    """Return what fits a terminal: the gated rates and a few more. The files have everything."""
    frame = result.to_frame([feature]).dropna(axis=1, how="all")
    main = ["count", *(result.gate.metrics or ()), "selection_rate", "roc_auc", "uncertainty"]
    kept = frame.columns if result.task == "regression" else [name for name in dict.fromkeys(main) if name in frame]
    return with_groups(frame[kept])
