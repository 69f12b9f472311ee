"""W1 to W7: when the filter's guarantee does not hold, or its decision rests on little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.cluster.hierarchy import average, to_tree
from scipy.spatial.distance import squareform

from groundwire_flea.exposure import Exposure
from groundwire_flea.functional import Array
from groundwire_flea.result import Caution, SourceId
from groundwire_flea.rows import Rows
from groundwire_flea.significance import Significance

#: Rows that the smallest group of a source should have.
FEW_ROWS = 50
#: A source whose p-value is at most this is called suspicious.
LEVEL = 0.05


@dataclass(frozen=True)
class Evidence:
    """What the rules look at."""

    rows: Rows
    ids: Sequence[SourceId]
    distance: Array
    q: Array
    kept: Array
    k: int
    tested: Significance | None
    disb: Array
    exposed: Exposure
    vouched: Sequence[int] = ()

    @property
    def noise(self) -> float:
        """How much distances vary by chance: measured by permutations, else the error of a difference of two gaps.

        A gap between two rates of 1/2 in groups of c rows has the variance 1 / (2 c), a difference of two twice that.
        """
        if self.tested is not None:
            return self.tested.spread
        return 1 / float(np.sqrt(self.cells.min()))

    @cached_property
    def cells(self) -> Array:
        """(n,) rows of the smallest group of each source."""
        counts = [self.rows.frequency(self.rows.a == group) * self.rows.sizes for group in range(self.rows.groups)]
        smallest: Array = np.min(counts, axis=0)
        return smallest

    @cached_property
    def by_score(self) -> Array:
        """(n,) kept, and not because the user vouches for them."""
        chosen = self.kept.copy()
        chosen[list(self.vouched)] = False
        return chosen

    def named(self, chosen: Array) -> tuple[SourceId, ...]:
        """Sources of a bool (n,)."""
        return tuple(source for source, here in zip(self.ids, chosen, strict=True) if here)


def cautions(
    rows: Rows,
    ids: Sequence[SourceId],
    distance: Array,
    q: Array,
    kept: Array,
    k: int,
    tested: Significance | None,
    disb: Array,
    exposed: Exposure,
    vouched: Sequence[int] = (),
) -> list[Caution]:
    """All that apply, in order."""
    evidence = Evidence(rows, ids, distance, q, kept, k, tested, disb, exposed, vouched)
    rules: tuple[Callable[[Evidence], Caution | None], ...] = (
        half_or_more,
        small_cells,
        no_gap,
        two_clusters,
        heterogeneous,
        vacuous_bound,
        kept_by_a_tie,
    )
    return [caution for rule in rules if (caution := rule(evidence)) is not None]


def listed(sources: Sequence[SourceId]) -> str:
    """Up to five names.

    Example:
        >>> listed(["a", "b"])
        "'a', 'b'"
    """
    return ", ".join(map(repr, sources[:5])) + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")


def half_or_more(e: Evidence) -> Caution | None:
    """W1: K is at most half, or half of the sources or more are suspicious."""
    n = e.rows.n
    if e.k <= n / 2:
        return Caution(
            "W1",
            f"n_clean={e.k} of {n} sources is not more than half: two camps of equal size could not be told apart, and "
            f"the theorem (an adversary changes a fixed set of less than half of the sources) says nothing -> use "
            f"n_clean >= {n // 2 + 1}, or always_keep= for sources that you vouch for",
            (),
            e.k / n,
        )
    if e.tested is not None and 2 * int((e.tested.p <= LEVEL).sum()) >= n:
        bad = e.named(e.tested.p <= LEVEL)
        return Caution(
            "W1",
            f"{len(bad)} of {n} sources are suspicious (p <= {LEVEL}): {listed(bad)}. If half or more are manipulated, "
            "the kept ones may be the manipulated ones -> look at these sources first",
            bad,
            len(bad) / n,
        )
    return None


def small_cells(e: Evidence) -> Caution | None:
    """W2: the smallest group of a source has few rows."""
    small = e.cells < FEW_ROWS
    if not small.any():
        return None
    fewest = int(e.cells.min())
    return Caution(
        "W2",
        f"the smallest group has fewer than {FEW_ROWS} rows in {listed(e.named(small))} (the fewest: {fewest}). "
        f"Distances between clean sources are then up to about {min(1, 2 / np.sqrt(max(fewest, 1))):.2f} by chance, "
        "and scores are dominated by noise -> join sources, or collect more rows of that group",
        e.named(small),
        float(fewest),
    )


def no_gap(e: Evidence) -> Caution | None:
    """W3: the last source that is kept and the first that is not differ by less than noise."""
    if e.kept.all() or not e.by_score.any():
        return None
    last, first = float(e.q[e.by_score].max()), float(e.q[~e.kept].min())
    if first - last >= e.noise:
        return None
    at = (e.by_score & (e.q == last)) | (~e.kept & (e.q == first))
    return Caution(
        "W3",
        f"no gap in the scores at the border: {first:.3f} is suppressed and {last:.3f} is kept, less apart than chance "
        f"({e.noise:.3f}), for {listed(e.named(at))}. This border is arbitrary; if nothing was manipulated, that is "
        "to be expected",
        e.named(at),
        first - last,
    )


def two_clusters(e: Evidence) -> Caution | None:
    """W4: two groups of sources, each close within and far from the other, of nearly the same size."""
    n = e.rows.n
    if n < 4:
        return None
    parts = np.zeros(n, dtype=bool)
    parts[to_tree(average(squareform(e.distance, checks=False))).left.pre_order()] = True
    parts ^= parts[0]
    across = float(e.distance[np.ix_(parts, ~parts)].mean())
    off = ~np.eye(n, dtype=bool)
    inner = [float(e.distance[np.outer(p, p) & off].mean()) if p.sum() > 1 else 0.0 for p in (parts, ~parts)]
    smaller = int(min(parts.sum(), n - parts.sum()))
    if smaller < 2 or smaller < 0.35 * n or across < 2 * max(inner) or across - max(inner) < e.noise:
        return None
    camp = e.named(parts if parts.sum() <= n / 2 else ~parts)
    return Caution(
        "W4",
        f"the sources fall into two camps of {n - smaller} and {smaller}: mean distance {across:.2f} between them and "
        f"at most {max(inner):.2f} within. The larger one counts as clean; the smaller one is {listed(camp)}. Make "
        "sure that the majority is the honest one",
        camp,
        smaller / n,
    )


def heterogeneous(e: Evidence) -> Caution | None:
    """W5: even the best scores are far above chance, so sources differ by nature.

    Scores in-sample are large for small clean sources too, because classifiers overfit; cross-fitted ones are not.
    """
    best = float(np.sort(e.q if e.tested is None else e.tested.q)[max(e.k // 2 - 1, 0)])
    balance = float(np.median(e.disb[~np.eye(e.rows.n, dtype=bool)]))
    limit = 0.25 + 2 * e.noise
    if best <= limit and balance <= 0.2:
        return None
    return Caution(
        "W5",
        f"the sources differ by nature{_or_overfit(e)}: half of the kept scores are above {best:.2f} and the median "
        f"disbalance is {balance:.2f}. The guarantee degrades by as much; what is kept resembles the majority, not "
        "the truth",
        tuple(e.ids),
        best,
    )


def _or_overfit(e: Evidence) -> str:
    if e.tested is not None:
        return ""
    return f", or have few rows for their {e.rows.x.shape[1]} columns (permutations= tells which)"


def vacuous_bound(e: Evidence) -> Caution | None:
    """W6: with so many manipulated rows and so rare a group, unfiltered training has no protection at all."""
    alpha, rarest, ratio = e.exposed.alpha, e.exposed.rarest, e.exposed.ratio
    if ratio < 1:
        return None
    return Caution(
        "W6",
        f"{e.rows.n - e.k} of {e.rows.n} sources may be manipulated, up to {alpha:.0%} of the rows, and the rarest "
        f"group that fairness looks at has {rarest:.1%} of them: alpha / P_min = {ratio:.2f} >= 1, so an adversary "
        "can make any learner that does not filter arbitrarily unfair. Do not train on the suppressed sources, or on "
        "weights, and expect fairness",
        (),
        ratio,
    )


def kept_by_a_tie(e: Evidence) -> Caution | None:
    """W7: a source that nobody vouches for is kept, and another one of the same score is not."""
    if e.kept.all():
        return None
    border = float(e.q[~e.kept].min())
    tied = np.isclose(e.q, border, rtol=0, atol=1e-12)
    first, last = tied & e.by_score, tied & ~e.kept
    if not first.any():
        return None
    return Caution(
        "W7",
        f"{listed(e.named(first))} is kept and {listed(e.named(last))} is not, with the same score {border:.3f}: "
        "the order of the sources decided",
        e.named(first | last),
        border,
    )
