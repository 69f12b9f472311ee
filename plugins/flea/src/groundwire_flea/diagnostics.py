"""Diagnostics of a selection, W1 to W8: the guarantee does not hold, or the decision rests on little."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import average, to_tree
from scipy.spatial.distance import squareform
from sklearn.linear_model import LogisticRegression

from groundwire_flea.result import Caution
from groundwire_flea.selection import Selection, SourceId

#: Rows that the smallest group of a source should have.
FEW_ROWS = 50
#: A source whose p-value is at most this is called suspicious.
LEVEL = 0.05


def diagnostics(selection: Selection) -> list[Caution]:
    """All that apply, in order."""
    tests: tuple[Callable[[Selection], Caution | None], ...] = (
        no_clean_majority,
        small_groups,
        no_gap_in_scores,
        two_clusters,
        heterogeneous_sources,
        vacuous_bound,
        tied_scores,
        near_copies,
    )
    return [caution for test in tests if (caution := test(selection)) is not None]


def no_clean_majority(s: Selection) -> Caution | None:
    """W1: K is at most half, or half of the sources or more are suspicious."""
    n = int(s.counted.sum())
    if s.k <= n / 2:
        return Caution(
            "W1",
            f"n_clean={s.k} of {n} sources is not more than half: two camps of equal size could not be told apart, and "
            f"the theorem (an adversary changes a fixed set of less than half of the sources) says nothing -> use "
            f"n_clean >= {n // 2 + 1}, or always_keep= for sources that you vouch for",
            (),
            s.k / n,
        )
    suspicious = s.counted & (s.significance.p <= LEVEL) if s.significance is not None else ~s.counted
    if s.significance is not None and 2 * int(suspicious.sum()) >= n:
        bad = s.names(suspicious)
        return Caution(
            "W1",
            f"{len(bad)} of {n} sources are suspicious (p <= {LEVEL}): {_listed(bad)}. If half or more are "
            "manipulated, the kept ones may be the manipulated ones -> look at these sources first",
            bad,
            len(bad) / n,
        )
    return None


def small_groups(s: Selection) -> Caution | None:
    """W2: the smallest group of a source has few rows."""
    smallest = s.data.group_counts().min(axis=1)
    small = smallest < FEW_ROWS
    if not small.any():
        return None
    fewest = int(smallest.min())
    return Caution(
        "W2",
        f"the smallest group has fewer than {FEW_ROWS} rows in {_listed(s.names(small))} (the fewest: {fewest}). "
        f"Distances between clean sources are then up to about {min(1, 2 / np.sqrt(max(fewest, 1))):.2f} by chance, "
        "and scores are dominated by noise -> join sources, or collect more rows of that group",
        s.names(small),
        float(fewest),
    )


def no_gap_in_scores(s: Selection) -> Caution | None:
    """W3: the last source that is kept and the first that is not differ by less than noise."""
    by_score = s.kept & s.counted & ~s.vouched
    if not s.rejected.any() or not by_score.any():
        return None
    last, first, noise = float(s.q[by_score].max()), float(s.q[s.rejected].min()), chance_spread(s)
    if first - last >= noise:
        return None
    at = (by_score & (s.q == last)) | (s.rejected & (s.q == first))
    return Caution(
        "W3",
        f"no gap in the scores at the border: {first:.3f} is suppressed and {last:.3f} is kept, less apart than chance "
        f"({noise:.3f}), for {_listed(s.names(at))}. This border is arbitrary; if nothing was manipulated, that is "
        f"to be expected{_hidden_flips(s, last)}",
        s.names(at),
        first - last,
    )


def two_clusters(s: Selection) -> Caution | None:
    """W4: two groups of sources, each close within and far from the other, of nearly the same size."""
    n, places = int(s.counted.sum()), np.flatnonzero(s.counted)
    if n < 4:
        return None
    total = s.total[np.ix_(places, places)]
    parts: NDArray[np.bool_] = np.zeros(n, dtype=bool)
    parts[to_tree(average(squareform(total, checks=False))).left.pre_order()] = True
    parts ^= parts[0]
    across = float(total[np.ix_(parts, ~parts)].mean())
    off = ~np.eye(n, dtype=bool)
    inner = [float(total[np.outer(p, p) & off].mean()) if p.sum() > 1 else 0.0 for p in (parts, ~parts)]
    smaller = int(min(parts.sum(), n - parts.sum()))
    if smaller < 2 or smaller < 0.35 * n or across < 2 * max(inner) or across - max(inner) < chance_spread(s):
        return None
    camp = tuple(s.ids[i] for i in places[parts if parts.sum() <= n / 2 else ~parts])
    return Caution(
        "W4",
        f"the sources fall into two camps of {n - smaller} and {smaller}: mean distance {across:.2f} between them and "
        f"at most {max(inner):.2f} within. The larger one counts as clean; the smaller one is {_listed(camp)}. Make "
        "sure that the majority is the honest one",
        camp,
        smaller / n,
    )


def heterogeneous_sources(s: Selection) -> Caution | None:
    """W5: even the best scores are far above chance, so sources differ by nature.

    Scores in-sample are large for small clean sources too, because classifiers overfit; cross-fitted ones are not.
    """
    tested = s.significance
    best = float(np.sort((s.q if tested is None else tested.q)[s.counted])[max(s.k // 2 - 1, 0)])
    balance = float(np.median(s.distances.disb[~np.eye(s.data.n, dtype=bool)]))
    if best <= 0.25 + 2 * chance_spread(s) and balance <= 0.2:
        return None
    overfit = f", or have few rows for their {s.data.x.shape[1]} columns (permutations= tells which)"
    return Caution(
        "W5",
        f"the sources differ by nature{overfit if tested is None else ''}: half of the kept scores are above "
        f"{best:.2f} and the median disbalance is {balance:.2f}. The guarantee degrades by as much; what is kept "
        "resembles the majority, not the truth",
        tuple(s.ids),
        best,
    )


def vacuous_bound(s: Selection) -> Caution | None:
    """W6: with so many manipulated rows and so rare a group, unfiltered training has no protection at all."""
    bound, n = s.bound, int(s.counted.sum())
    if bound.ratio < 1:
        return None
    return Caution(
        "W6",
        f"{n - s.k} of {n} sources may be manipulated, up to {bound.alpha:.0%} of the rows, and the rarest "
        f"group that fairness looks at has {bound.rarest:.1%} of them: alpha / P_min = {bound.ratio:.2f} >= 1, so an "
        "adversary can make any learner that does not filter arbitrarily unfair. Do not train on the suppressed "
        "sources, or on weights, and expect fairness",
        (),
        bound.ratio,
    )


def tied_scores(s: Selection) -> Caution | None:
    """W7: a source that nobody vouches for is kept, and another one of the same score is not."""
    if not s.rejected.any():
        return None
    border = float(s.q[s.rejected].min())
    tied = np.isclose(s.q, border, rtol=0, atol=1e-12)
    first, last = tied & s.kept & s.counted & ~s.vouched, tied & s.rejected
    if not first.any():
        return None
    return Caution(
        "W7",
        f"{_listed(s.names(first))} is kept and {_listed(s.names(last))} is not, with the same score {border:.3f}: "
        "the order of the sources decided",
        s.names(first | last),
        border,
    )


def near_copies(s: Selection) -> Caution | None:
    """W8: sources are near copies of each other, so one source has several votes, or is in the data several times."""
    if not s.copies:
        return None
    sets = "; ".join(_listed(copies) for copies in s.copies)
    votes = max(len(copies) for copies in s.copies)
    if s.counted.all():
        effect = (
            f"Each counts among the {s.data.n}, so one source has up to {votes} votes: copies displace honest sources, "
            "and copies of a manipulated one outvote them -> count_copies_once=True, or leave the copies out"
        )
    else:
        effect = "Those of a set count as one source, and only the first one's rows may be kept"
    return Caution("W8", f"near copies of each other, by their rows: {sets}. {effect}", sum(s.copies, ()), float(votes))


def group_flip_effects(s: Selection) -> NDArray[Any]:
    """(groups,) the distance by which flipping all labels of one group moves a source, about.

    A flip turns the error e of a classifier within the group into 1 - e, so the error on the source moves by
    P(a) (1 - 2 e). The best classifier's e is estimated by a logistic regression on the kept rows.
    """
    rows = s.kept[s.data.source]
    x, y, a = s.data.x[rows], s.data.y[rows], s.data.a[rows]
    with warnings.catch_warnings(action="ignore"):  # an estimate need not converge
        wrong = LogisticRegression(max_iter=300).fit(x, y).predict(x) != y
    effects = [(a == group).mean() * max(0, 1 - 2 * wrong[a == group].mean()) for group in range(s.data.groups)]
    return np.array(effects)


def _hidden_flips(s: Selection, last: float) -> str:
    """The groups whose labels could be flipped without a score above ``last``, the largest of those kept."""
    if s.data.classes != 2:
        return ""
    effects = group_flip_effects(s)
    hidden = [f"{name!r} (about {effect:.2f})" for name, effect in zip(s.groups, effects, strict=True) if effect < last]
    if not hidden:
        return ""
    return (
        f". Flipped labels of one group only are at chance level here for {', '.join(hidden[:5])}: they move a "
        f"distance by less than the {last:.2f} up to which scores are kept, so the filter may well not notice them"
    )


def chance_spread(s: Selection) -> float:
    """Variation of distances by chance: measured by permutations, else the error of a difference of two gaps.

    A gap between two rates of 1/2 in groups of c rows has the variance 1 / (2 c), a difference of two twice that.
    """
    if s.significance is not None:
        return s.significance.spread
    return 1 / float(np.sqrt(s.data.group_counts().min()))


def _listed(sources: Sequence[SourceId]) -> str:
    """Up to five names."""
    return ", ".join(map(repr, sources[:5])) + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")
