"""Lists of single samples, over all processes: those that a version flipped, and those that compression might.

Each process sends as many rows as a list can hold and no more. What is listed does not depend on how rows were dealt
out to processes, as long as they have ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from groundwire.ranks import gathered
from groundwire_bias_audit.flips import column_of, flipped, surest_first
from groundwire_bias_audit.passes import Record
from groundwire_bias_audit.susceptibility import rank_susceptible


def susceptible(trainer: Any, record: Record | None, most: int) -> pd.DataFrame | None:
    """The samples of a binary task most likely to flip; None for other tasks."""
    own = None
    if record is not None and record.outputs.task == "binary" and record.outputs.scores is not None:
        scores = record.outputs.scores[:, 0]
        features = {column_of(name): values for name, values in record.features.items()}
        own = rank_susceptible(scores, features, ids=record.sample_ids, top=most)  # type: ignore[arg-type]
    found = _joined(trainer, own)
    if found is None:
        return None
    order = ["susceptibility", "id"]
    return found.sort_values(order, ascending=[False, True], kind="stable").head(most).reset_index(drop=True)


def surest_flips(
    trainer: Any, first: Record | None, second: Record | None, task: str, most: int
) -> pd.DataFrame | None:
    """Flips that the first model was surest about."""
    own = None if first is None or second is None else flipped(first, second).head(most)
    found = _joined(trainer, own)
    return None if found is None else surest_first(found, task).head(most)


def drawn_flips(
    trainer: Any, first: Record | None, second: Record | None, features: Sequence[str], per_group: int
) -> pd.DataFrame | None:
    """At most ``per_group`` flips of each group at random, since the surest are not typical; None without any."""
    own, features = None, [column_of(name) for name in features]
    known = first is not None and first.ids is not None and first.outputs.task != "regression"
    if first is not None and known and second is not None:
        own = drawn(flipped(first, second), features, per_group)
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
