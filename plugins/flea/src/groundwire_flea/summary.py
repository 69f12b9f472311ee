"""The report table and the result from everything that was computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from groundwire_flea.distances import Distances
from groundwire_flea.exposure import Exposure
from groundwire_flea.functional import Array, gamma
from groundwire_flea.result import Caution, FLEAResult
from groundwire_flea.rows import Rows
from groundwire_flea.significance import Significance

if TYPE_CHECKING:
    from groundwire_flea.selector import FLEASelector


def summarize(
    selector: FLEASelector,
    rows: Rows,
    found: Distances,
    tested: Significance | None,
    always: list[int],
    known: list[Caution],
    exposed: Exposure,
) -> FLEAResult:
    """Everything as a :class:`FLEAResult`."""
    ids, kept, q = selector.source_ids_, selector.support_, selector.q_
    frames = [table(values, ids) for values in (selector.D_, found.disc, found.disp, found.disb)]
    row_kept = kept[selector._source]
    return FLEAResult(
        kept=tuple(s for s, k in zip(ids, kept, strict=True) if k),
        suppressed=tuple(s for s, k in zip(ids, kept, strict=True) if not k),
        scores={source: float(score) for source, score in zip(ids, q, strict=True)},
        distances=frames[0],
        disc=frames[1],
        disp=frames[2],
        disb=frames[3],
        report=report(selector, rows, found, tested, always),
        mask=row_kept if selector.mode == "filter" else np.ones_like(row_kept),
        weights=source_weights(q, kept)[selector._source] if selector.mode == "weights" else None,
        warnings=tuple(known),
        n_clean=selector.n_clean_,
        mode=selector.mode,
        bound=exposed.bound,
    )


def table(values: Array, ids: tuple[object, ...]) -> pd.DataFrame:
    """(n, n) with the sources as index and columns; also sources that are tuples."""
    index = pd.Index(ids, tupleize_cols=False)
    return pd.DataFrame(values, index=index, columns=index)


def source_weights(q: Array, kept: Array) -> Array:
    """1 for kept sources; for others ``exp(1 - q / q_kept)``, where q_kept is the largest kept score. No guarantee.

    Example:
        >>> source_weights(np.array([0.1, 0.2, 0.4]), np.array([True, True, False])).round(3)
        array([1.   , 1.   , 0.368])
    """
    scale = max(float(q[kept].max()), 1e-12)
    weights: Array = np.where(kept, 1.0, np.exp(np.minimum(0, 1 - q / scale)))
    return weights


def report(
    selector: FLEASelector, rows: Rows, found: Distances, tested: Significance | None, always: list[int]
) -> pd.DataFrame:
    """One row for each source."""
    encoder, n = selector._encoder, rows.n
    columns: dict[str, object] = {"rows": np.bincount(selector._source)}
    for code, label in enumerate(encoder.labels):
        columns[f"P(y={label})"] = rows.frequency(rows.y == code)
    for code, group in enumerate(encoder.groups):
        columns[f"P(a={group})"] = rows.frequency(rows.a == code)
    columns["label gap"] = label_gap(rows)
    columns["q"] = selector.q_
    for name, value in zip(("disc", "disp", "disb"), shares(selector.D_, found, selector.n_clean_), strict=True):
        columns[f"{name} share"] = value
    columns["cross-fitted q"] = np.full(n, np.nan) if tested is None else tested.q
    columns["p-value"] = np.full(n, np.nan) if tested is None else tested.p
    columns["kept"] = selector.support_
    columns["why"] = reasons(selector, tested, always)
    return pd.DataFrame(columns, index=pd.Index(selector.source_ids_, name="source", tupleize_cols=False))


def label_gap(rows: Rows) -> Array:
    """(n,) the largest difference between groups in the frequency of a label."""
    gaps = []
    for label in range(rows.classes):
        rates = [
            rows.frequency((rows.y == label) & (rows.a == g)) / rows.frequency(rows.a == g) for g in range(rows.groups)
        ]
        gaps.append(gamma(np.stack(rates, axis=-1)))
    result: Array = np.max(gaps, axis=0)
    return result


def shares(total: Array, found: Distances, k: int) -> Array:
    """(3, n): which part of a source's mean distance to its K nearest each component makes up.

    With the aggregation "max" they are shares of the sum of the components all the same.
    """
    nearest = np.argsort(total, axis=1, kind="stable")[:, :k]
    parts = np.stack([np.take_along_axis(part, nearest, 1).sum(1) for part in (found.disc, found.disp, found.disb)])
    whole = parts.sum(0)
    result: Array = np.divide(parts, whole, out=np.zeros_like(parts), where=whole > 0)
    return result


def reasons(selector: FLEASelector, tested: Significance | None, always: list[int]) -> list[str]:
    """Why each source is kept or suppressed, in words."""
    q, k = selector.q_, selector.n_clean_
    places = np.argsort(np.argsort(q, kind="stable"), kind="stable") + 1
    texts = []
    for i, (place, is_kept) in enumerate(zip(places, selector.support_, strict=True)):
        rank = f"score {q[i]:.3f} is number {place} of {len(q)} from below"
        if i in always:
            texts.append(f"always kept; {rank}")
        elif is_kept and place <= k:
            texts.append(f"{rank}, and {k} are kept")
        elif is_kept and tested is not None:
            texts.append(f"not suspicious (p = {tested.p[i]:.3f} > {selector.alpha:g}); {rank}")
        else:
            texts.append(f"{rank}, and only {k} are kept")
    return texts
