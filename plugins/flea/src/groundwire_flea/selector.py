"""The filter as a scikit-learn style selector of sources."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from groundwire_flea.cautions import cautions
from groundwire_flea.checks import check_arguments, check_compat, check_power, check_sources
from groundwire_flea.columns import column_of, plain, same_length
from groundwire_flea.distances import Distances, distances
from groundwire_flea.encoding import Encoder
from groundwire_flea.exposure import exposure
from groundwire_flea.functional import COMPONENTS, Array, clean_count, q_scores, select
from groundwire_flea.result import FLEAResult, FLEAWarning, SourceId
from groundwire_flea.rows import Rows
from groundwire_flea.settings import Fairness, Mode, Settings
from groundwire_flea.significance import Significance, significance
from groundwire_flea.summary import summarize


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
    D_: Array
    disc_: Array
    disp_: Array
    disb_: Array
    q_: Array
    support_: Array
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
        check_arguments(self)
        self._encoder = Encoder(self.append_sensitive)
        encoded = self._encoder.fit_encode(X, y, sensitive_features)
        check_compat(self.compat, self._encoder)
        self._rows: Rows | None = None
        self._distances: Distances | None = None
        self._source: Array = np.zeros(0, dtype=int)
        self.source_ids_: tuple[SourceId, ...] = ()
        self._random = check_random_state(self.random_state)
        return self._add(*encoded, sources)

    def partial_fit(self, X: Any, y: Any, *, sensitive_features: Any, sources: Any) -> FLEASelector:  # noqa: N803
        """Add sources that came later; only pairs with a new source are compared. Scores of old ones may change.

        Raises:
            ValueError: As :meth:`fit`; also for columns, labels or groups that ``fit`` did not see, and for a source
                that is there already.
        """
        if not hasattr(self, "result_"):
            return self.fit(X, y, sensitive_features=sensitive_features, sources=sources)
        return self._add(*self._encoder.encode(X, y, sensitive_features), sources)

    def get_support(self, indices: bool = False) -> Array:
        """Which sources are kept: bool (n,), or their places in ``source_ids_``.

        Raises:
            NotFittedError: Before ``fit``.
        """
        check_is_fitted(self, "support_")
        return np.flatnonzero(self.support_) if indices else self.support_

    def select_rows(self, sources: Any) -> Array:
        """Which rows are of kept sources: bool (R,).

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
        result: Array = self.support_[[known[plain(s)] for s in series]]
        return result

    def fit_resample(self, X: Any, y: Any, *, sensitive_features: Any, sources: Any) -> tuple[Any, Any]:  # noqa: N803
        """``fit``, then X and y of the rows to train on; their types stay."""
        self.fit(X, y, sensitive_features=sensitive_features, sources=sources)
        mask = self.result_.mask
        return _rows_of(X, mask), _rows_of(y, mask)

    def _add(self, numbers: Array, labels: Array, groups: Array, sources: Any) -> FLEASelector:
        names = column_of(sources, "sources")
        same_length(X=numbers, sources=names)
        codes, found = pd.factorize(names)
        ids = tuple(plain(v) for v in found)
        known = [s for s in ids if s in self.source_ids_]
        if known:
            raise ValueError(f"source {known[0]!r} was compared already -> give only new sources, or fit again")
        chosen = self._choose_rows(codes, labels, groups)
        new = self._made_rows(numbers[chosen], labels[chosen], groups[chosen], np.bincount(codes[chosen]))
        rows = new if self._rows is None else self._rows.followed_by(new)
        check_sources(rows, (*self.source_ids_, *ids), self._encoder, self.fairness, self.always_keep)
        k = clean_count(self.n_clean, rows.n)
        if self.keep_unsuspicious:
            check_power(self.alpha, self._permutations, k)
        self._source = np.concatenate([self._source, codes + len(self.source_ids_)])
        self._rows, self.source_ids_ = rows, (*self.source_ids_, *ids)
        self._distances = distances(rows, self._settings(), self._distances)
        self._decide(rows, self._distances)
        return self

    def _choose_rows(self, codes: Array, labels: Array, groups: Array) -> Array:
        """Rows in order of their sources; of each source at most ``max_rows_per_source``, alike in all its cells."""
        order = np.argsort(codes, kind="stable")
        if self.max_rows_per_source is None:
            return order
        shuffled = pd.Series(self._random.permutation(len(codes)))
        cell = [codes, labels, groups]
        place = (shuffled.groupby(cell).rank() - 0.5) / shuffled.groupby(cell).transform("size")
        wanted = place.groupby(codes).rank(method="first") <= self.max_rows_per_source
        chosen: Array = order[wanted.to_numpy()[order]]
        return chosen

    def _made_rows(self, x: Array, y: Array, a: Array, sizes: Array) -> Rows:
        encoder = self._encoder
        if self.positive_label is not None and self.positive_label not in encoder.labels:
            raise ValueError(f"positive_label={self.positive_label!r} is none of the labels {encoder.labels}")
        positive = len(encoder.labels) - 1 if self.positive_label is None else encoder.labels.index(self.positive_label)
        return Rows(x, y, a, sizes, len(encoder.labels), len(encoder.groups), positive)

    @property
    def _permutations(self) -> int:
        return self.permutations or (20 if self.keep_unsuspicious else 0)

    def _settings(self) -> Settings:
        return Settings(
            fairness=self.fairness,
            components=tuple(self.components),
            aggregation=self.aggregation,
            compat=self.compat,
            device=self.device,
            n_jobs=self.n_jobs,
            progress=self.progress,
        )

    def _decide(self, rows: Rows, found: Distances) -> None:
        settings = self._settings()
        self.n_clean_ = clean_count(self.n_clean, rows.n)
        self.disc_, self.disp_, self.disb_ = found.disc, found.disp, found.disb
        self.D_ = found.total(self.aggregation)
        self.q_ = q_scores(self.D_, self.n_clean_)
        always = [self.source_ids_.index(source) for source in self.always_keep]
        self.support_ = select(self.q_, self.n_clean_, always)
        trusted = select(self.q_, self.n_clean_)
        tested = significance(rows, settings, trusted, self._permutations, self._random)
        if self.keep_unsuspicious and tested is not None:
            self.support_ = self.support_ | (tested.p > self.alpha)
        self._finish(rows, found, tested, always)

    def _finish(self, rows: Rows, found: Distances, tested: Significance | None, always: list[int]) -> None:
        exposed = exposure(rows, self.n_clean_, self.fairness)
        known = cautions(
            rows, self.source_ids_, self.D_, self.q_, self.support_, self.n_clean_, tested, self.disb_, exposed, always
        )
        for caution in known:
            warnings.warn(str(caution), FLEAWarning, stacklevel=5)
        self.result_ = summarize(self, rows, found, tested, always, known, exposed)
        self.report_ = self.result_.report


def _rows_of(values: Any, mask: Array) -> Any:
    if isinstance(values, pd.DataFrame | pd.Series):
        return values.loc[mask]
    return [v for v, kept in zip(values, mask, strict=True) if kept] if isinstance(values, list) else values[mask]
