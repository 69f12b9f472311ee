"""The rows whose predictions two versions of a model disagree about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.passes import LOADER_STEP, Record


def flipped(first: Record, second: Record) -> pd.DataFrame:
    """Rows whose prediction differs, those the first model was surest of first; the index is the row in ``first``."""
    a, b = first.outputs, second.outputs
    differs = a.predictions != b.predictions
    rows = np.flatnonzero(differs.any(axis=1) if differs.ndim == 2 else differs)
    column = differs[rows].argmax(axis=1) if differs.ndim == 2 else np.zeros(len(rows), int)

    def of(values: Any) -> Any:
        return values[rows, column] if values.ndim == 2 else values[rows]

    table: dict[str, Any] = {"id": rows if first.ids is None else first.ids[rows] % LOADER_STEP}
    table |= {name: [values[i] for i in rows] for name, values in first.features.items()}
    if a.task == "multilabel":
        table["target"] = column
    table |= {"label": of(a.labels), "before": of(a.predictions), "after": of(b.predictions)}
    for name, outputs in (("score_before", a), ("score_after", b)):
        if outputs.scores is not None:
            table[name] = outputs.scores.max(axis=1)[rows] if a.task == "multiclass" else of(outputs.scores)
    table["change"] = np.select(
        [table["before"] == table["label"], table["after"] == table["label"]], ["broken", "mended"], "other error"
    )
    frame = pd.DataFrame(table, index=rows)
    if "score_before" not in frame:
        return frame
    sure = (frame["score_before"] - (0.5 if a.task != "multiclass" else 0)).abs()
    return frame.loc[sure.sort_values(ascending=False, kind="stable").index]
