"""The filter as a scikit-learn style selector of sources, and as one function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import RandomState
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from groundwire_flea.copies import first_copies, representatives
from groundwire_flea.diagnostics import diagnostics
from groundwire_flea.distances.pairwise import COMPONENTS, DistanceOptions, Distances, distances
from groundwire_flea.distances.sources import FAIRNESS, Fairness, Sources, check_sources
from groundwire_flea.inputs.encoding import Encoder
from groundwire_flea.inputs.validation import column_of, plain, same_length
from groundwire_flea.result import FLEAResult, FLEAWarning
from groundwire_flea.selection import MODES, Mode, SourceId, check_n_clean, clean_count, select_sources
from groundwire_flea.significance import check_power


class FLEASelector(BaseEstimator):  # type: ignore[misc]
    """Select the data sources that are safe to train a fair classifier on.

    It selects whole sources, so it is a selector of rows and not a transformer of columns: scikit-learn's
    ``transform`` must keep the number of rows.

    Args:
        n_clean: How many sources are assumed clean: int in 1..n, float in (0, 1] meaning ``ceil(n_clean * n)``, None
            for ``n // 2 + 1``. With n / 2 or fewer there is no guarantee, and a warning.
        fairness: "demographic_parity" (the paper), "equal_opportunity" or "equalized_odds".
        mode: "filter" drops rows; "weights" gives suppressed sources small sampling weights, without any guarantee;
            "report" only reports.
        components: Which parts of the distance count.
        aggregation: "sum" of the parts (the paper) or their "max".
        compat: "reference" computes each pair as the published code does, slowly.
        append_sensitive: Append the encoded group to X, unless X has an identical column.
        always_keep: Sources that the user vouches for. They count among the K that are kept.
        count_copies_once: Count near copies as one source, of which the first is kept or suppressed, and the others are
            suppressed. By default they are named (W8), and each counts.
        keep_unsuspicious: Keep, beyond K, every source whose cross-fitted score is not suspicious at ``alpha``.
        alpha: Level of that permutation test.
        permutations: Number of permutations for p-values; 0 for none (20 if ``keep_unsuspicious``).
        positive_label: The label that equal opportunity is about; the largest when left out.
        max_rows_per_source: Compare at most so many rows of a source (stratified); all when left out.
        random_state: Of that choice, of the folds and of the permutations.
        n_jobs: Number of joblib's workers; None follows ``joblib.parallel_config``.
        device: torch device that solves.
        progress: Show a progress bar.

    Attributes:
        source_ids_: Sources in order of first appearance.
        n_clean_: K.
        D_, disc_, disp_, disb_: (n, n) distances.
        q_: (n,) scores.
        support_: (n,) bool, kept or not.
        report_: One row for each source.
        result_: The :class:`FLEAResult` for the rows of ``fit``, and of ``partial_fit`` after them.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, source = rng.integers(2, size=1500), np.repeat(["A", "B", "C"], 500)
        >>> X = np.column_stack([rng.normal(size=1500), a])
        >>> y = (X[:, 0] + rng.normal(size=1500) > 0).astype(int)
        >>> y[source == "B"] = 1 - y[source == "B"]
        >>> selector = FLEASelector().fit(X, y, sensitive_features=a, sources=source)
        >>> selector.get_support(indices=True)
        array([0, 2])
    """

    n_clean_: int
    D_: NDArray[Any]
    disc_: NDArray[Any]
    disp_: NDArray[Any]
    disb_: NDArray[Any]
    q_: NDArray[Any]
    support_: NDArray[Any]
    report_: pd.DataFrame
    result_: FLEAResult

    def __init__(
        self,
        n_clean: int | float | None = None,
        *,
        fairness: Fairness = "demographic_parity",
        mode: Mode = "filter",
        components: Sequence[str] = COMPONENTS,
        aggregation: str = "sum",
        compat: str | None = None,
        append_sensitive: bool = False,
        always_keep: Sequence[SourceId] = (),
        count_copies_once: bool = False,
        keep_unsuspicious: bool = False,
        alpha: float = 0.05,
        permutations: int = 0,
        positive_label: Any = None,
        max_rows_per_source: int | None = None,
        random_state: int | None = 0,
        n_jobs: int | None = None,
        device: str = "cpu",
        progress: bool = False,
    ) -> None:
        self.n_clean = n_clean
        self.fairness = fairness
        self.mode = mode
        self.components = components
        self.aggregation = aggregation
        self.compat = compat
        self.append_sensitive = append_sensitive
        self.always_keep = always_keep
        self.count_copies_once = count_copies_once
        self.keep_unsuspicious = keep_unsuspicious
        self.alpha = alpha
        self.permutations = permutations
        self.positive_label = positive_label
        self.max_rows_per_source = max_rows_per_source
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.device = device
        self.progress = progress

    def fit(self, X: Any, y: Any, *, sensitive_features: Any, sources: Any) -> FLEASelector:  # noqa: N803
        """Compare all sources and choose.

        Args:
            X: (R, d) array, data frame or tensor. Text and categorical columns are one-hot encoded; numbers are used
                as they are.
            y: (R,) labels of two or more classes.
            sensitive_features: (R,) groups, two or more; several columns of a data frame are intersected.
            sources: (R,) the source of each row.

        Raises:
            ValueError: An input or an argument cannot be used; see the text.
            TypeError: ``n_clean`` is a bool or no number.
        """
        self._check_arguments()
        encoder = Encoder(self.append_sensitive)
        encoded = encoder.fit_encode(X, y, sensitive_features)
        if self.compat == "reference" and max(len(encoder.labels), len(encoder.groups)) > 2:
            raise ValueError(
                f"compat='reference' knows two labels and two groups, the data have {len(encoder.labels)} and "
                f"{len(encoder.groups)} -> leave compat out"
            )
        return self._add(_Compared(encoder, check_random_state(self.random_state)), *encoded, sources)

    def partial_fit(self, X: Any, y: Any, *, sensitive_features: Any, sources: Any) -> FLEASelector:  # noqa: N803
        """Add sources that came later; only pairs with a new source are compared. Scores of old ones may change.

        Raises:
            ValueError: As :meth:`fit`; also for columns, labels or groups that ``fit`` did not see, and for a source
                that is there already.
        """
        if not hasattr(self, "result_"):
            return self.fit(X, y, sensitive_features=sensitive_features, sources=sources)
        known = replace(self._compared, random=copy.deepcopy(self._compared.random))
        return self._add(known, *known.encoder.encode(X, y, sensitive_features), sources)

    def get_support(self, indices: bool = False) -> NDArray[Any]:
        """Return the sources that are kept: bool (n,), or their places in ``source_ids_``.

        Raises:
            NotFittedError: Before ``fit``.
        """
        check_is_fitted(self, "support_")
        return np.flatnonzero(self.support_) if indices else self.support_

    def select_rows(self, sources: Any) -> NDArray[Any]:
        """Return the rows that are of kept sources: bool (R,).

        Args:
            sources: (R,) the source of each row.

        Raises:
            ValueError: A source was not compared.
        """
        check_is_fitted(self, "support_")
        series = column_of(sources, "sources")
        known = {source: place for place, source in enumerate(self.source_ids_)}
        unseen = sorted({repr(plain(s)) for s in series if plain(s) not in known})
        if unseen:
            raise ValueError(f"sources {', '.join(unseen[:5])} were never compared -> use partial_fit for new sources")
        result: NDArray[Any] = self.support_[[known[plain(s)] for s in series]]
        return result

    def fit_resample(self, X: Any, y: Any, *, sensitive_features: Any, sources: Any) -> tuple[Any, Any]:  # noqa: N803
        """``fit``, then X and y of the rows to train on; their types stay."""
        self.fit(X, y, sensitive_features=sensitive_features, sources=sources)
        mask = self.result_.mask
        return _rows_of(X, mask), _rows_of(y, mask)

    def _add(self, known: _Compared, x: NDArray[Any], y: NDArray[Any], a: NDArray[Any], sources: Any) -> FLEASelector:
        """Compare new rows with the known ones, and select. Nothing of the selector changes unless all succeeds."""
        encoder, names = known.encoder, column_of(sources, "sources")
        same_length(X=x, sources=names)
        codes, found = pd.factorize(names)
        new_ids = tuple(plain(v) for v in found)
        twice = [s for s in new_ids if s in known.ids]
        if twice:
            raise ValueError(f"source {twice[0]!r} was compared already -> give only new sources, or fit again")
        chosen = self._choose_rows(codes, y, a, known.random)
        data = self._sources(encoder, x[chosen], y[chosen], a[chosen], np.bincount(codes[chosen]))
        data = data if known.data is None else known.data.followed_by(data)
        ids = (*known.ids, *new_ids)
        check_sources(data, ids, encoder.labels, encoder.groups, self.fairness)
        unknown = [source for source in self.always_keep if source not in ids]
        if unknown:
            raise ValueError(f"always_keep names {unknown[0]!r}, which is none of the sources {list(ids)}")
        stands_for = representatives(first_copies(data), [ids.index(source) for source in self.always_keep])
        k = clean_count(self.n_clean, len(set(stands_for.tolist())) if self.count_copies_once else data.n)
        permutations = self.permutations or (20 if self.keep_unsuspicious else 0)
        if self.keep_unsuspicious:
            check_power(self.alpha, permutations, k)
        options = DistanceOptions(
            fairness=self.fairness,
            components=tuple(self.components),
            aggregation=self.aggregation,
            compat=self.compat,
            device=self.device,
            n_jobs=self.n_jobs,
            progress=self.progress,
        )
        parts = distances(data, options, known.distances)
        selection = select_sources(
            data,
            ids,
            encoder.labels,
            encoder.groups,
            parts,
            options,
            k=k,
            stands_for=stands_for,
            count_copies_once=self.count_copies_once,
            always_keep=self.always_keep,
            keep_unsuspicious=self.keep_unsuspicious,
            alpha=self.alpha,
            permutations=permutations,
            random=known.random,
        )
        row_source = np.concatenate([known.row_source, codes + len(known.ids)])
        cautions = diagnostics(selection)
        result = FLEAResult.of(selection, cautions, row_source=row_source, mode=self.mode, alpha=self.alpha)
        self._compared = _Compared(encoder, known.random, ids, data, parts, row_source)
        self.source_ids_, self.n_clean_, self.q_, self.support_ = ids, selection.k, selection.q, selection.kept
        self.D_, self.disc_, self.disp_, self.disb_ = selection.total, parts.disc, parts.disp, parts.disb
        self.result_, self.report_ = result, result.report
        for caution in result.warnings:
            warnings.warn(str(caution), FLEAWarning, stacklevel=3)
        return self

    def _choose_rows(
        self, codes: NDArray[Any], labels: NDArray[Any], groups: NDArray[Any], random: RandomState
    ) -> NDArray[Any]:
        """Rows in order of their sources; of each source at most ``max_rows_per_source``, alike in all its cells.

        Of copies in the same order the same rows, so that they stay copies.
        """
        order = np.argsort(codes, kind="stable")
        if self.max_rows_per_source is None:
            return order
        within = pd.Series(codes).groupby(codes).cumcount()
        shuffled = pd.Series(random.permutation(within.max() + 1)[within])
        cell = [codes, labels, groups]
        place = (shuffled.groupby(cell).rank() - 0.5) / shuffled.groupby(cell).transform("size")
        wanted = place.groupby(codes).rank(method="first") <= self.max_rows_per_source
        chosen: NDArray[Any] = order[wanted.to_numpy()[order]]
        return chosen

    def _sources(
        self, encoder: Encoder, x: NDArray[Any], y: NDArray[Any], a: NDArray[Any], sizes: NDArray[Any]
    ) -> Sources:
        if self.positive_label is not None and self.positive_label not in encoder.labels:
            raise ValueError(f"positive_label={self.positive_label!r} is none of the labels {encoder.labels}")
        positive = len(encoder.labels) - 1 if self.positive_label is None else encoder.labels.index(self.positive_label)
        return Sources(x, y, a, sizes, len(encoder.labels), len(encoder.groups), positive)

    def _check_arguments(self) -> None:
        """Refuse arguments that no data could make right."""
        given: dict[str, Any] = self.get_params()
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
        most, permutations = given["max_rows_per_source"], given["permutations"]
        if isinstance(components, str) or not components or set(components) - set(COMPONENTS):
            raise ValueError(f"components={components!r} -> choose some of {COMPONENTS}")
        if isinstance(vouched, str) or not isinstance(vouched, Collection):
            raise ValueError(f"always_keep={vouched!r} -> give a list of sources")
        if not isinstance(alpha, Real) or not 0 < float(alpha) < 1:
            raise ValueError(f"alpha={alpha!r} -> use a number in (0, 1)")
        if most is not None and (not isinstance(most, Integral) or most < 4):
            raise ValueError(f"max_rows_per_source={most!r} -> use some hundreds")
        if not isinstance(permutations, Integral) or permutations < 0:
            raise ValueError(f"permutations={permutations!r} -> use an int, 0 for none")
        if self.compat == "reference" and self.fairness != "demographic_parity":
            raise ValueError("compat='reference' knows demographic parity only -> leave compat out")
        check_n_clean(self.n_clean)


@dataclass(frozen=True)
class _Compared:
    """Rows that a selector compared so far, and what it needs to compare more of them alike."""

    encoder: Encoder
    random: RandomState
    ids: tuple[SourceId, ...] = ()
    data: Sources | None = None
    distances: Distances | None = None
    row_source: NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=int))


def _rows_of(values: Any, mask: NDArray[Any]) -> Any:
    if isinstance(values, pd.DataFrame | pd.Series):
        return values.loc[mask]
    return [v for v, kept in zip(values, mask, strict=True) if kept] if isinstance(values, list) else values[mask]


def filter_sources(
    X: Any,  # noqa: N803
    y: Any,
    *,
    sensitive_features: Any,
    sources: Any,
    n_clean: int | float | None = None,
    fairness: Fairness = "demographic_parity",
    **options: Any,
) -> FLEAResult:
    """Find the data sources that would make a classifier unfair or wrong (FLEA).

    Every two sources are compared by the largest difference in error that a linear classifier can have on them
    (discrepancy), the largest difference in unfairness (disparity), and the difference of their group frequencies
    (disbalance). A source is kept if it is close to K - 1 others, where K sources are assumed clean.

    Args:
        X: (R, d) array, data frame or tensor of features, used as given; text columns are one-hot encoded.
        y: (R,) labels of two or more classes.
        sensitive_features: (R,) groups, two or more.
        sources: (R,) the source of each row; at least 3 different ones.
        n_clean: K: an int in 1..n, or a float in (0, 1] meaning ``ceil(n_clean * n)``; ``n // 2 + 1`` when left out.
        fairness: "demographic_parity", "equal_opportunity" or "equalized_odds".
        options: Any other argument of :class:`FLEASelector`.

    Returns:
        What is kept, and everything behind the decision.

    Raises:
        ValueError: An input cannot be used: too few sources, a source without some label or group, missing or infinite
            numbers, unequal lengths, an argument out of range.
        TypeError: ``n_clean`` is a bool or no number.

    Warns:
        FLEAWarning: Once for each entry of ``FLEAResult.warnings``.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> a, source = rng.integers(2, size=1500), np.repeat(["A", "B", "C"], 500)
        >>> X = np.column_stack([rng.normal(size=1500), a])
        >>> y = (X[:, 0] + rng.normal(size=1500) > 0).astype(int)
        >>> y[source == "B"] = 1 - y[source == "B"]
        >>> filter_sources(X, y, sensitive_features=a, sources=source).kept
        ('A', 'C')
    """
    selector = FLEASelector(n_clean, fairness=fairness, **options)
    return selector.fit(X, y, sensitive_features=sensitive_features, sources=sources).result_
