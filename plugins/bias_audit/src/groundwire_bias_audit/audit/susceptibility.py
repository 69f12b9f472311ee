"""From the dense model alone: which samples would compression flip, and will it increase bias?

Three rankings, to be compared on flips that really happened: by confidence alone, by a shortcut model, and at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from groundwire_bias_audit.audit.groups import encoded, named_columns, read_groups
from groundwire_bias_audit.audit.rates import Floats, ratio
from groundwire_bias_audit.audit.score_metrics import BAND

Method: TypeAlias = Literal["shortcut", "confidence", "random"]
METHODS = ("shortcut", "confidence", "random")


def susceptibility(
    scores: ArrayLike,
    sensitive_features: Any = None,
    *,
    method: Method = "confidence",
    base_rates: ArrayLike | None = None,
    random_state: int = 0,
) -> Floats:
    """Rank how likely compression is to flip each prediction; larger is more likely, only the order means something.

    ``confidence``: closeness of the score to 0.5. ``shortcut``: a compressed model is taken to lean on the group, its
    logit moving from z towards the group's prior logit a; the prediction flips when z has gone z / (z - a) of the way,
    so 1 minus that is the score where z and a disagree, and the confidence (below 0) where they agree. ``random``: for
    comparison.

    Args:
        scores: P(y=1) of the dense model, shape (n,).
        sensitive_features: Groups, for ``shortcut``.
        method: See above.
        base_rates: P(y=1 | group) in training, by group in sorted order; the dense model's own selection rates when
            left out.
        random_state: Seed of ``random``.

    Raises:
        ValueError: ``method`` is unknown, ``shortcut`` has no groups, or a score is outside [0, 1] or NaN.

    Example:
        >>> susceptibility([0.5, 0.05, 0.8]).round(3).tolist()
        [0.0, -2.944, -1.386]
        >>> p, g = [0.6, 0.6, 0.9, 0.9, 0.1, 0.1], [0, 1, 0, 0, 1, 1]
        >>> int(susceptibility(p, g, method="shortcut").argmax())  # predicted 1 in a group that mostly is 0
        1
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    p = _checked(scores)
    if method == "random":
        return np.random.default_rng(random_state).random(len(p))
    logit = _logit(p)
    if method == "confidence":
        return 0.0 - np.abs(logit)
    if sensitive_features is None:
        raise ValueError("method 'shortcut' needs sensitive_features")
    groups = read_groups(sensitive_features, rows=len(p))
    assert groups.codes is not None
    if base_rates is None:
        chosen = np.bincount(groups.codes, p >= 0.5, minlength=groups.size)
        size = np.bincount(groups.codes, minlength=groups.size)
        rates = (chosen + 0.5) / (size + 1)
    else:
        rates = np.asarray(base_rates, dtype=float)
    prior = _logit(rates)[groups.codes]
    opposed = np.sign(logit) * np.sign(prior) < 0
    with np.errstate(divide="ignore", invalid="ignore"):
        way = np.where(opposed, logit / (logit - prior), 1.0)
    return np.where(opposed, 1 - way, -np.abs(logit))


def _logit(p: NDArray[Any]) -> Floats:
    q = np.clip(np.asarray(p, dtype=float), 1e-6, 1 - 1e-6)
    found: Floats = np.log(q / (1 - q))
    return found


def rank_susceptible(
    scores: ArrayLike,
    sensitive_features: Any = None,
    *,
    ids: Sequence[Any] | None = None,
    method: Method = "confidence",
    top: int | None = None,
) -> pd.DataFrame:
    """The samples most likely to be flipped by compression, first; export it with :func:`to_csv`.

    Args:
        scores: P(y=1) of the dense model, shape (n,).
        sensitive_features: Groups, shown in the list.
        ids: Names of the samples; their positions when left out.
        method: See :func:`susceptibility`.
        top: How many to list; all when left out.

    Returns:
        Columns ``id``, the features, ``score``, ``uncertain`` (inside 0.1-0.9), ``susceptibility``.

    Example:
        >>> rank_susceptible([0.99, 0.55, 0.2], ["f", "m", "f"], ids=["a", "b", "c"], top=2)["id"].tolist()
        ['b', 'c']
    """
    p = np.asarray(scores, dtype=float)
    value = susceptibility(p, sensitive_features, method=method)
    table: dict[str, Any] = {"id": np.arange(len(p)) if ids is None else list(ids)}
    for name, column in [] if sensitive_features is None else named_columns(sensitive_features, "sensitive_feature"):
        codes, levels = encoded(name, column, len(p), len(p))
        table[name] = [levels[i] for i in codes]
    table |= {"score": p, "uncertain": (p > BAND[0]) & (p < BAND[1]), "susceptibility": value}
    ranked = pd.DataFrame(table).sort_values("susceptibility", ascending=False, kind="stable")
    return ranked.head(top).reset_index(drop=True)


def _checked(scores: ArrayLike) -> NDArray[np.float64]:
    p = np.asarray(scores, dtype=float)
    if p.ndim != 1:
        raise ValueError(f"scores must be probabilities of shape (n,), got shape {p.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("scores must be probabilities in [0, 1], some are outside or NaN")
    return p


def evaluate_susceptibility(
    flipped: ArrayLike, scores: ArrayLike, sensitive_features: Any = None, *, random_state: int = 0
) -> dict[str, float]:
    """AUROC of each ranking for flips that really happened; 0.5 is chance, NaN if all or none flipped.

    Args:
        flipped: Whether compression flipped each prediction, shape (n,).
        scores: P(y=1) of the dense model, shape (n,).
        sensitive_features: Groups; without them ``shortcut`` is left out.
        random_state: Seed of ``random``.

    Raises:
        ValueError: ``flipped`` and ``scores`` differ in shape, or a score is outside [0, 1] or NaN.

    Example:
        >>> evaluate_susceptibility([True, False, False], [0.55, 0.99, 0.02])["confidence"]
        1.0
    """
    flips = np.asarray(flipped, dtype=bool)
    if flips.shape != np.shape(scores):
        raise ValueError(f"flipped has shape {flips.shape}, and scores {np.shape(scores)} -> align them row by row")
    found = {}
    for method in METHODS:
        if method == "shortcut" and sensitive_features is None:
            continue
        value = susceptibility(scores, sensitive_features, method=method, random_state=random_state)  # type: ignore[arg-type]
        found[method] = float(roc_auc_score(flips, value)) if 0 < flips.sum() < len(flips) else float("nan")
    return found


def bias_risk(scores: ArrayLike, sensitive_features: Any) -> pd.DataFrame:
    """Will compression increase bias? What the dense model says about each group, the most exposed one first.

    Compression flips uncertain predictions first, so a group with more of them has more to lose. A group is
    ``exposed`` where its share of uncertain scores is significantly above that of the rest (exact permutation test,
    Holm over groups, 5 %). It is a warning, not a forecast: whether flips harm is seen only in the compressed model.

    Args:
        scores: P(y=1) of the dense model, shape (n,).
        sensitive_features: One feature or several, crossed.

    Returns:
        By group: ``count``, ``uncertainty``, ``excess`` over the rest, ``p_adjusted``, ``exposed``.

    Example:
        >>> risk = bias_risk([0.99] * 90 + [0.5] * 10 + [0.99] * 50 + [0.5] * 50, ["f"] * 100 + ["m"] * 100)
        >>> risk.index[0], bool(risk["exposed"].iloc[0]), bool(risk["exposed"].iloc[1])
        ('m', True, False)
    """
    from groundwire_bias_audit.audit.hypothesis_tests import adjust, homogeneity

    p = _checked(scores)
    groups = read_groups(sensitive_features, rows=len(p))
    assert groups.codes is not None
    inside = (p > BAND[0]) & (p < BAND[1])
    n = np.bincount(groups.codes, minlength=groups.size)
    k = np.bincount(groups.codes, inside, minlength=groups.size).astype(np.int64)
    rest_n, rest_k = n.sum() - n, k.sum() - k
    p_values = [
        homogeneity([a, b], [m, o]) if m and o else np.nan for a, b, m, o in zip(k, rest_k, n, rest_n, strict=True)
    ]
    adjusted = adjust(p_values)
    excess = ratio(k, n) - ratio(rest_k, rest_n)
    table = pd.DataFrame(
        {
            "count": n, "uncertainty": ratio(k, n), "excess": excess, "p_adjusted": adjusted,
            "exposed": (excess > 0) & (adjusted <= 0.05),
        },
        index=groups.index,
    )  # fmt: skip
    return table[table["count"] > 0].sort_values("excess", ascending=False)
