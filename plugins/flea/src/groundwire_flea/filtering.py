"""The filter as one function."""

from __future__ import annotations

from typing import Any

from groundwire_flea.result import FLEAResult
from groundwire_flea.selector import FLEASelector
from groundwire_flea.settings import Fairness


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
