"""Compression-identified exemplars: samples whose usual prediction changes between populations of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class CIE:
    """Compression-identified exemplars of two populations of models.

    Attributes:
        exemplars: Whether the modal predictions of the populations differ, shape (n,).
        taxicab: L1 distance between the label distributions of the populations, in [0, 2], shape (n,).
        modal_dense: Modal prediction of the dense models.
        modal_compressed: Modal prediction of the compressed models.
        ties: Samples with two modal predictions in a population; the smaller one was taken.
    """

    exemplars: NDArray[np.bool_]
    taxicab: NDArray[np.float64]
    modal_dense: NDArray[Any]
    modal_compressed: NDArray[Any]
    ties: int

    @property
    def rate(self) -> float:
        """Share of exemplars."""
        return float(self.exemplars.mean())

    def by_group(self, groups: Any) -> pd.DataFrame:
        """Count, share of exemplars and mean taxicab distance of each group."""
        table = pd.DataFrame({"count": 1, "cie_rate": self.exemplars, "taxicab": self.taxicab})
        return table.groupby(np.asarray(groups)).agg({"count": "sum", "cie_rate": "mean", "taxicab": "mean"})


def flip_rate(first: ArrayLike, second: ArrayLike) -> float:
    """Share of rows that two models predict differently. One pair tells about churn, never about CIE.

    Raises:
        ValueError: The lengths differ, or there is no row.

    Example:
        >>> flip_rate([0, 1, 1, 0], [0, 1, 0, 0])
        0.25
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"two models must predict the same rows, got shapes {a.shape} and {b.shape}")
    return float((a != b).mean())


def cie(dense: ArrayLike, compressed: ArrayLike) -> CIE:
    """Compression-identified exemplars: samples whose modal prediction differs between two populations.

    Args:
        dense: Class predicted by each dense model, shape (M, n), M >= 2; models differ in their seed.
        compressed: By each compressed model, shape (K, n), K >= 2.

    Returns:
        Exemplars and taxicab distances, sum over classes of |freq(compressed) - freq(dense)|.

    Raises:
        ValueError: A population has one model (see :func:`flip_rate`), or the numbers of samples differ.

    Example:
        >>> found = cie([[0, 1, 1], [0, 1, 1], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]])
        >>> found.exemplars.tolist(), found.taxicab.round(3).tolist()
        ([False, True, False], [0.0, 2.0, 0.667])
    """
    a, b = np.asarray(dense), np.asarray(compressed)
    for name, population in (("dense", a), ("compressed", b)):
        if population.ndim != 2 or len(population) < 2:
            raise ValueError(
                f"{name} must be predictions of at least two models, shape (M, n), got shape {population.shape} "
                "-> one pair of models is compared by flip_rate"
            )
    if a.shape[1] != b.shape[1] or not a.shape[1]:
        raise ValueError(f"the populations predict {a.shape[1]} and {b.shape[1]} samples")
    classes = np.unique(np.concatenate([a, b]))
    first, second = (np.stack([(p == c).mean(axis=0) for c in classes]) for p in (a, b))
    modal = [classes[f.argmax(axis=0)] for f in (first, second)]
    tied = [(f == f.max(axis=0)).sum(axis=0) > 1 for f in (first, second)]
    taxicab = np.abs(first - second).sum(axis=0)
    return CIE(modal[0] != modal[1], taxicab, modal[0], modal[1], int((tied[0] | tied[1]).sum()))
