"""Attribution shift: where a variant looks and where the dense model does, always against a null band.

Two equally good dense models that differ in their seed differ in their attributions about as much as a dense and a
pruned one, so a shift means nothing without such a null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from groundwire_bias_audit.attribution.maps import METHODS, Maps, attributions, resolved, without_gradients_kept
from groundwire_bias_audit.audit.groups import read_groups


def map_similarity(first: Maps, second: Maps, mask: NDArray[np.bool_] | None) -> dict[str, NDArray[np.float64]]:
    """Each measure of each pair of rows of two sets of maps ``(n, positions)``; NaN where a map is constant.

    Example:
        >>> a = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
        >>> map_similarity(a, 2 * a, None)["spearman"].tolist()
        [1.0, nan]
    """
    pairs = list(zip(first, second, strict=True))
    found = {
        "spearman": np.array([_spearman(a, b) for a, b in pairs]),
        "top_overlap": np.array([_overlap(a, b) for a, b in pairs]),
    }
    if mask is not None:
        found["region_mass"] = _mass(second, mask) - _mass(first, mask)
    return found


def _spearman(a: Maps, b: Maps) -> float:
    return float("nan") if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


def _overlap(a: Maps, b: Maps) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    k = max(1, round(0.1 * len(a)))
    top = [set(np.argsort(-m, kind="stable")[:k].tolist()) for m in (a, b)]
    return len(top[0] & top[1]) / len(top[0] | top[1])


def _mass(maps: Maps, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    total = np.abs(maps).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, np.abs(maps[:, mask]).sum(axis=1) / total, np.nan)


ModelVariant: TypeAlias = nn.Module | tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]


@dataclass(frozen=True)
class AttributionShift:
    """Differences of the attributions of a dense model and a variant of it.

    Attributes:
        table: By group: ``count``; for each measure its value, ``<measure>_null_low`` and ``_null_high`` (smallest and
            largest of the null models, NaN without) and ``<measure>_outside`` (whether the value is beyond that band;
            None without null models).
        method: Of the attribution.
        interpretable: Whether there are null models.
        rows: Positions of the rows that were drawn, by group, shape (m,).
        codes: Group of each of them, as a position in ``table``.
        maps: Attributions of the dense model and of the variant for these rows, each of shape (m, positions).
    """

    table: pd.DataFrame
    method: str
    interpretable: bool
    rows: NDArray[Any] = field(repr=False)
    codes: NDArray[Any] = field(repr=False)
    maps: tuple[Maps, Maps] = field(repr=False)

    def __str__(self) -> str:
        note = (
            ""
            if self.interpretable
            else "\nuninterpretable: no null model was given, so there is nothing to compare with"
        )
        return f"Attribution shift by {self.method}\n{self.table}{note}"


def attribution_shift(
    dense: nn.Module,
    version: ModelVariant,
    inputs: Tensor,
    targets: Tensor | Sequence[int],
    sensitive_features: Any,
    *,
    null: Sequence[ModelVariant] = (),
    method: str = "auto",
    layer: nn.Module | None = None,
    region: Any = None,
    per_group: int = 64,
    internal_batch_size: int = 32,
    max_groups: int = 100,
    random_state: int = 0,
) -> AttributionShift:
    """Compare the attributions of a variant with those of the dense model, by group and against a null band.

    Args:
        dense: The dense model; ``dense(inputs)`` gives scores (B,), (B, 1) or (B, C).
        version: A variant: another model, or ``(module, apply)`` where ``apply()`` is a context manager that makes
            ``module`` the variant while open (as :class:`groundwire.Variant` does).
        inputs: Shape (n, ...).
        targets: Class whose score is attributed, for each row.
        sensitive_features: Groups of the rows.
        null: Dense models to compare with instead: of other seeds, or fine-tuned.
        method: "auto" is Grad-CAM at the last convolution, where there is one, else input x gradient. Integrated
            gradients cost some 70 forward passes, occlusion 100.
        layer: Layer for Grad-CAM; the last convolution when left out. With another architecture in ``variant`` or
            ``null`` leave it out.
        region: Mask of the shape of one input without channels; the share of absolute attribution inside is the
            measure ``region_mass`` (its difference to the dense model's).
        per_group: Most rows of each group, drawn at random.
        internal_batch_size: Rows attributed at a time.
        max_groups: Most values of a feature.
        random_state: Seed of the draw.

    Returns:
        Spearman's correlation, overlap (intersection over union) of the top 10 % of positions, and the change of the
        mass in ``region``; means over the rows of a group. Constant maps are undefined and do not count.

    Raises:
        ValueError: Unknown method, or shapes that do not fit.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> x, y, g = torch.randn(6, 1, 4, 4), [0, 1, 0, 1, 0, 1], ["f", "m"] * 3
        >>> shift = attribution_shift(net, net, x, y, g)
        >>> shift.table["spearman"].round(6).tolist(), shift.interpretable
        ([1.0, 1.0], False)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    labels = torch.as_tensor(targets)
    if len(labels) != len(inputs):
        raise ValueError(f"{len(inputs)} inputs and {len(labels)} targets")
    groups = read_groups(sensitive_features, rows=len(inputs), max_groups=max_groups)
    assert groups.codes is not None
    rows, codes = _drawn(groups.codes, groups.size, per_group, random_state)
    chosen = resolved(method, dense, layer)

    def maps(model: ModelVariant) -> Maps:
        module, apply = model if isinstance(model, tuple) else (model, nullcontext)
        with apply(), without_gradients_kept(module):
            at = layer if module is dense else None
            return attributions(module, inputs[rows], labels[rows], chosen, at, internal_batch_size)

    reference = maps(dense)
    mask = None if region is None else _mask(region, inputs)
    own = maps(version)
    found = map_similarity(reference, own, mask)
    band = [map_similarity(reference, maps(model), mask) for model in null]
    table = _table(found, band, codes, groups.index)
    return AttributionShift(table, chosen, bool(band), rows, codes, (reference, own))


def _drawn(codes: NDArray[Any], size: int, most: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(np.flatnonzero(codes == g))[:most] for g in range(size)])
    return rows, codes[rows]


def _mask(region: Any, inputs: Tensor) -> NDArray[np.bool_]:
    mask = np.asarray(region, dtype=bool).reshape(-1)
    positions = math.prod(inputs.shape[2:]) if inputs.ndim > 2 else inputs.shape[1]
    if len(mask) != positions:
        raise ValueError(f"region has {len(mask)} positions, and an input has {positions}")
    return mask


def _table(
    found: dict[str, NDArray[np.float64]],
    band: Sequence[dict[str, NDArray[np.float64]]],
    codes: NDArray[Any],
    index: pd.Index,
) -> pd.DataFrame:
    columns: dict[str, Any] = {"count": np.bincount(codes, minlength=len(index))}
    for name, values in found.items():
        own = _by_group(values, codes, len(index))
        null = np.array([_by_group(b[name], codes, len(index)) for b in band])
        low, high = (np.full(len(own), np.nan),) * 2 if not len(null) else (null.min(axis=0), null.max(axis=0))
        columns |= {name: own, f"{name}_null_low": low, f"{name}_null_high": high}
        beyond = (own < low) | (own > high)
        columns[f"{name}_outside"] = beyond if len(null) else np.full(len(own), None, dtype=object)
    return pd.DataFrame(columns, index=index)


def _by_group(values: NDArray[np.float64], codes: NDArray[Any], size: int) -> NDArray[np.float64]:
    held = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = np.bincount(codes[held], values[held], minlength=size)
        return np.where(held.any(), sums / np.bincount(codes[held], minlength=size), np.nan)
