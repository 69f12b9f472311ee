"""The rows whose predictions two versions of a model disagree about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.passes import LOADER_STEP, Record

#: Columns of the lists of samples.
COLUMNS = frozenset(
    (
        "id", "target", "label", "before", "after", "score_before", "score_after", "change", "score", "uncertain",
        "susceptibility",
    )
)  # fmt: skip


def column_of(feature: str) -> str:
    """Where a feature stands in a list of samples, whose own columns it must not replace.

    Example:
        >>> column_of("sex"), column_of("label")
        ('sex', 'group label')
    """
    return f"group {feature}" if feature in COLUMNS else feature


def flipped(first: Record, second: Record) -> pd.DataFrame:
    """Rows whose prediction differs, those the first model was surest of first.

    Returns:
        Columns ``id`` (data set index), the features, ``target`` (of a multilabel task the first one that differs),
        ``label``, ``before``, ``after``, the scores of both, and ``change``. The index is that of ``first.ids``, or the
        row where there are none.
    """
    a, b = first.outputs, second.outputs
    differs = a.predictions != b.predictions
    rows = np.flatnonzero(differs.any(axis=1) if differs.ndim == 2 else differs)
    column = differs[rows].argmax(axis=1) if differs.ndim == 2 else np.zeros(len(rows), int)

    def of(values: Any) -> Any:
        return values[rows, column] if values.ndim == 2 else values[rows]

    names = rows if first.ids is None else first.ids[rows]
    table: dict[str, Any] = {"id": names % LOADER_STEP}
    table |= {column_of(name): [values[i] for i in rows] for name, values in first.features.items()}
    if a.task == "multilabel":
        table["target"] = column
    table |= {"label": of(a.labels), "before": of(a.predictions), "after": of(b.predictions)}
    for name, outputs in (("score_before", a), ("score_after", b)):
        if outputs.scores is not None:
            table[name] = outputs.scores.max(axis=1)[rows] if a.task == "multiclass" else of(outputs.scores)
    table["change"] = np.select(
        [table["before"] == table["label"], table["after"] == table["label"]], ["broken", "mended"], "other error"
    )
    return surest_first(pd.DataFrame(table, index=names), a.task)


def surest_first(flips: pd.DataFrame, task: str) -> pd.DataFrame:
    """``flips`` in the order of how sure the first model was; ties by their index."""
    if "score_before" not in flips:
        return flips.sort_index()
    sure = (flips["score_before"] - (0.5 if task != "multiclass" else 0)).abs().to_numpy()
    return flips.iloc[np.lexsort((flips.index.to_numpy(), -sure))]
