r"""What FLEA computes from distances: the definitions of the paper on one screen, in NumPy.

For two sources S and T, with f over a class of classifiers, R the 0/1 error and Gamma the unfairness,

.. math::
    disc(S, T) = \max_f |R_S(f) - R_T(f)|, \quad
    disp(S, T) = \max_f |\Gamma_S(f) - \Gamma_T(f)|, \quad
    disb(S, T) = TV(a_S, a_T)

D = disc + disp + disb. The score q of a source is its K-th smallest distance, its own distance 0 included, where K
sources are assumed clean; the K sources of smallest score are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

#: The three parts of the distance, in the order of the paper.
COMPONENTS = ("disc", "disp", "disb")
Array = np.ndarray[Any, np.dtype[Any]]


def clean_count(n_clean: Any, n: int) -> int:
    """K, the number of sources assumed clean, of ``n``.

    Args:
        n_clean: An int in 1..n; a float in (0, 1] meaning ``ceil(n_clean * n)``; None for ``n // 2 + 1``.
        n: Number of sources.

    Raises:
        TypeError: ``n_clean`` is a bool, or no number.
        ValueError: It is out of its range.

    Example:
        >>> clean_count(None, 5), clean_count(0.6, 5), clean_count(4, 5)
        (3, 3, 4)
    """
    check_n_clean(n_clean)
    if n_clean is None:
        return n // 2 + 1
    if isinstance(n_clean, Integral):
        if int(n_clean) > n:
            raise ValueError(f"n_clean={n_clean} is outside 1..{n}, the number of sources -> choose more than {n // 2}")
        return int(n_clean)
    # 0.6 * 5 is a little more than 3 in floating point, and must still mean 3.
    return max(1, math.ceil(round(float(n_clean) * n, 9)))


def check_n_clean(n_clean: Any) -> None:
    """Refuse what no number of sources could make right; see :func:`clean_count`.

    Raises:
        TypeError: ``n_clean`` is a bool, or no number.
        ValueError: It is an int below 1, or a fraction outside (0, 1].

    Example:
        >>> check_n_clean(4)
    """
    if n_clean is None:
        return
    if isinstance(n_clean, bool | np.bool_) or not isinstance(n_clean, Real):
        raise TypeError(f"n_clean must be an int, a float or None, got {n_clean!r} -> say how many sources are clean")
    if isinstance(n_clean, Integral):
        if int(n_clean) < 1:
            raise ValueError(f"n_clean={n_clean} is not positive -> choose more than half of the number of sources")
    elif not 0 < float(n_clean) <= 1:
        raise ValueError(f"n_clean={n_clean} is a fraction outside (0, 1] -> use an int for a number of sources")


def total_distance(disc: Array, disp: Array, disb: Array, aggregation: str = "sum") -> Array:
    """D from its three parts, each (n, n): their sum (the paper), or their maximum.

    Example:
        >>> total_distance(np.array(0.1), np.array(0.25), np.array(0.5)).item()
        0.85
    """
    parts = np.stack([disc, disp, disb])
    total: Array = parts.sum(0) if aggregation == "sum" else parts.max(0)
    return total


def disbalance(cells: Array) -> Array:
    """Total variation distance between the cell frequencies of each two sources.

    With two groups and demographic parity this is the published |P_S(a=1) - P_T(a=1)|.

    Args:
        cells: (n, c), frequencies of the c cells (groups; or groups within labels) in each source, rows sum to 1.

    Example:
        >>> disbalance(np.array([[0.5, 0.5], [0.75, 0.25]]))
        array([[0.  , 0.25],
               [0.25, 0.  ]])
    """
    result: Array = np.abs(cells[:, None] - cells[None]).sum(-1) / 2
    return result


def q_scores(distances: Array, k: int) -> Array:
    """The K-th smallest entry of each row of D (n, n), the zero on the diagonal included.

    Example:
        >>> q_scores(np.array([[0, 1, 5], [1, 0, 6], [5, 6, 0]]), 2)
        array([1, 1, 5])
    """
    ordered: Array = np.sort(distances, axis=1)
    return ordered[:, k - 1]


def select(q: Array, k: int, always: Sequence[int] = ()) -> Array:
    """Which sources are kept: bool (n,). Exactly K, of equal scores the earlier ones; ``always`` come first.

    Example:
        >>> select(np.array([0.2, 0.9, 0.2, 0.2]), 2)
        array([ True, False,  True, False])
    """
    kept = np.zeros(len(q), dtype=bool)
    kept[list(always)] = True
    for index in np.argsort(q, kind="stable"):
        if kept.sum() >= k:
            break
        kept[index] = True
    return kept


def gamma(rates: Array) -> Array:
    """Unfairness from positive rates by group: the largest difference between two groups, over the last axis.

    Example:
        >>> gamma(np.array([0.25, 0.5, 0.375])).item()
        0.25
    """
    result: Array = rates.max(-1) - rates.min(-1)
    return result


def unavoidable_unfairness(alpha: float, rarest: float) -> float:
    """How unfair an adversary can make any learner that sees one pooled sample: ``min(1, alpha / rarest)``.

    The order of the lower bound for demographic parity of Konstantinov and Lampert (JMLR 23, 2022), without its
    constant, capped at 1, where it says nothing more.

    Args:
        alpha: Fraction of the rows that the adversary may change, in [0, 1].
        rarest: Frequency of the rarest group (for equal opportunity: of the rarest group with a positive label).

    Raises:
        ValueError: ``alpha`` or ``rarest`` is out of range.

    Example:
        >>> unavoidable_unfairness(0.1, 0.2)
        0.5
    """
    if not 0 <= alpha <= 1 or not 0 < rarest <= 1:
        raise ValueError(f"alpha must be in [0, 1] and rarest in (0, 1], got {alpha} and {rarest}")
    return min(1.0, alpha / rarest)
