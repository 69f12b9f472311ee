"""Lists of samples: those that a variant flipped, and those that compression might flip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from groundwire.distributed import gathered
from groundwire_bias_audit.audit.susceptibility import rank_susceptible
from groundwire_bias_audit.stream.scored_rows import LOADER_STEP, ScoredRows

#: Columns of the lists of samples.
COLUMNS = frozenset(
    (
        "id", "target", "label", "before", "after", "score_before", "score_after", "change", "score", "uncertain",
        "susceptibility",
    )
)  # fmt: skip


def column_of(feature: str) -> str:
    """Column of a feature in a list of samples, whose own columns it must not replace.

    Example:
        >>> column_of("sex"), column_of("label")
        ('sex', 'group label')
    """
    return f"group {feature}" if feature in COLUMNS else feature


def flipped_samples(first: ScoredRows, second: ScoredRows) -> pd.DataFrame:
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


def susceptible_samples(trainer: Any, rows: ScoredRows | None, most: int) -> pd.DataFrame | None:
    """The samples of a binary task most likely to flip; None for other tasks."""
    own = None
    if rows is not None and rows.outputs.task == "binary" and rows.outputs.scores is not None:
        scores = rows.outputs.scores[:, 0]
        features = {column_of(name): values for name, values in rows.features.items()}
        own = rank_susceptible(scores, features, ids=rows.sample_ids, top=most)  # type: ignore[arg-type]
    found = _joined(trainer, own)
    if found is None:
        return None
    order = ["susceptibility", "id"]
    return found.sort_values(order, ascending=[False, True], kind="stable").head(most).reset_index(drop=True)


def surest_flips(
    trainer: Any, first: ScoredRows | None, second: ScoredRows | None, task: str, most: int
) -> pd.DataFrame | None:
    """Flips that the first model was surest about."""
    own = None if first is None or second is None else flipped_samples(first, second).head(most)
    found = _joined(trainer, own)
    return None if found is None else surest_first(found, task).head(most)


def drawn_flips(
    trainer: Any, first: ScoredRows | None, second: ScoredRows | None, features: Sequence[str], per_group: int
) -> pd.DataFrame | None:
    """At most ``per_group`` flips of each group at random, since the surest are not typical; None without any."""
    own, features = None, [column_of(name) for name in features]
    known = first is not None and first.ids is not None and first.outputs.task != "regression"
    if first is not None and known and second is not None:
        own = drawn(flipped_samples(first, second), features, per_group)
    found = _joined(trainer, own)
    return None if found is None else drawn(found, features, per_group)


def drawn(flips: pd.DataFrame, features: Sequence[str], per_group: int) -> pd.DataFrame:
    """The flips of each group whose ids have the smallest hashes: at random, and the same in any order.

    Example:
        >>> flips = pd.DataFrame({"sex": ["f", "m", "f", "f"]}, index=[3, 1, 0, 2])
        >>> drawn(flips, ["sex"], 2).index.tolist() == drawn(flips.sort_index(), ["sex"], 2).index.tolist()
        True
    """
    mixed = flips.iloc[np.argsort(pd.util.hash_array(flips.index.to_numpy(np.uint64)), kind="stable")]
    return mixed.groupby(list(features), dropna=False, sort=False).head(per_group)


def _joined(trainer: Any, own: pd.DataFrame | None) -> pd.DataFrame | None:
    """The rows of all processes; None if none has any to list."""
    found = [part for part in gathered(trainer, own) if part is not None]
    return pd.concat([part for part in found if len(part)] or found[:1]) if found else None
