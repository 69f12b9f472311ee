"""What the filter refuses: arguments out of range, and sources that cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from groundwire_flea.encoding import Encoder
from groundwire_flea.functional import COMPONENTS, check_n_clean
from groundwire_flea.result import SourceId
from groundwire_flea.rows import Rows
from groundwire_flea.settings import FAIRNESS, MODES

if TYPE_CHECKING:
    from groundwire_flea.selector import FLEASelector


def check_arguments(selector: FLEASelector) -> None:
    """Refuse arguments that no data could make right.

    Raises:
        ValueError: One is out of its range.
        TypeError: ``n_clean`` is a bool or no number.
    """
    given: dict[str, Any] = selector.get_params()
    choices = {
        "fairness": FAIRNESS,
        "mode": MODES,
        "aggregation": ("sum", "max"),
        "compat": (None, "reference"),
    }
    for name, allowed in choices.items():
        if given[name] not in allowed:
            raise ValueError(f"{name}={given[name]!r} -> choose one of {', '.join(map(repr, allowed))}")
    components, vouched, alpha = given["components"], given["always_keep"], given["alpha"]
    if isinstance(components, str) or not components or set(components) - set(COMPONENTS):
        raise ValueError(f"components={components!r} -> choose some of {COMPONENTS}")
    if isinstance(vouched, str) or not isinstance(vouched, Collection):
        raise ValueError(f"always_keep={vouched!r} -> give a list of sources")
    if not isinstance(alpha, Real) or not 0 < float(alpha) < 1:
        raise ValueError(f"alpha={alpha!r} -> use a number in (0, 1)")
    _check_counts(given["max_rows_per_source"], given["permutations"])
    if selector.compat == "reference" and selector.fairness != "demographic_parity":
        raise ValueError("compat='reference' knows demographic parity only -> leave compat out")
    check_n_clean(selector.n_clean)


def _check_counts(most: Any, permutations: Any) -> None:
    if most is not None and (not isinstance(most, Integral) or most < 4):
        raise ValueError(f"max_rows_per_source={most!r} -> use some hundreds")
    if not isinstance(permutations, Integral) or permutations < 0:
        raise ValueError(f"permutations={permutations!r} -> use an int, 0 for none")


def check_compat(compat: str | None, encoder: Encoder) -> None:
    """Refuse data that the published code knows nothing of.

    Raises:
        ValueError: ``compat`` is "reference" and there are more than two labels or groups.
    """
    if compat == "reference" and max(len(encoder.labels), len(encoder.groups)) > 2:
        raise ValueError(
            f"compat='reference' knows two labels and two groups, the data have {len(encoder.labels)} and "
            f"{len(encoder.groups)} -> leave compat out"
        )


def check_power(alpha: float, permutations: int, k: int) -> None:
    """Refuse a test that could never find a source suspicious: it would keep every manipulated one.

    Raises:
        ValueError: The smallest p-value that ``permutations`` of ``k`` sources can give is above ``alpha``.

    Example:
        >>> check_power(0.05, 20, 3)
    """
    least = 1 / (1 + permutations * k)
    if least > alpha:
        raise ValueError(
            f"keep_unsuspicious=True with permutations={permutations}: {k} sources then give p-values of at least "
            f"{least:.3f}, so nothing is ever suspicious at alpha={alpha:g} -> use permutations >= "
            f"{math.ceil((1 / alpha - 1) / k)}"
        )


def check_sources(
    rows: Rows, ids: Sequence[SourceId], encoder: Encoder, fairness: str, always_keep: Sequence[SourceId]
) -> None:
    """Refuse sources between which the distances are not defined.

    Raises:
        ValueError: There are fewer than 3, one that is vouched for is missing, or one lacks a label or a group.
    """
    if rows.n < 3:
        raise ValueError(
            f"{rows.n} sources ({', '.join(map(repr, ids))}) cannot be compared -> FLEA needs at least 3, of which "
            "more than half are clean"
        )
    unknown = [source for source in always_keep if source not in ids]
    if unknown:
        raise ValueError(f"always_keep names {unknown[0]!r}, which is none of the sources {list(ids)}")
    problems = missing_cells(rows, ids, encoder, fairness)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{'; '.join(problems[:5])}{more} -> the distances are not defined there: leave such sources out, or "
            "join small ones"
        )


def missing_cells(rows: Rows, ids: Sequence[SourceId], encoder: Encoder, fairness: str) -> list[str]:
    """What is missing for the distances to be defined: labels and groups within sources, one line each."""
    problems = []
    for label in range(rows.classes):
        for i in np.flatnonzero(rows.frequency(rows.y == label) == 0).tolist():
            problems.append(f"source {ids[i]!r} ({rows.sizes[i]} rows) has no row with label {encoder.labels[label]!r}")
    labels: list[int | None] = [None]
    if fairness != "demographic_parity":
        labels = [rows.positive] if fairness == "equal_opportunity" else list(range(rows.classes))
    for wanted in labels:
        where = "" if wanted is None else f" and label {encoder.labels[wanted]!r}"
        within = np.ones(len(rows.y), dtype=bool) if wanted is None else rows.y == wanted
        for group in range(rows.groups):
            for i in np.flatnonzero(rows.frequency(within & (rows.a == group)) == 0).tolist():
                problems.append(
                    f"source {ids[i]!r} ({rows.sizes[i]} rows) has no row of group {encoder.groups[group]!r}{where}"
                )
    return problems
