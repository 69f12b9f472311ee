"""Where the models look: attributions of the dense model and of a version, always against a null band.

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

from groundwire_bias_audit.grouping import read_groups

Maps: TypeAlias = NDArray[np.float64]
Version: TypeAlias = nn.Module | tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]
METHODS = ("auto", "gradcam", "input_x_gradient", "integrated_gradients", "occlusion")
MEASURES = ("spearman", "top_overlap", "region_mass")


@dataclass(frozen=True)
class AttributionShift:
    """How attributions differ between a dense model and a version of it.

    Attributes:
        table: By group: ``count``; for each measure its value, ``<measure>_null_low`` and ``_null_high`` (smallest and
            largest of the null models, NaN without) and ``<measure>_outside`` (whether the value is beyond that band;
            None without null models).
        method: Of the attribution.
        interpretable: Whether there are null models.
        rows: Positions of the rows that were drawn, by group, shape (m,).
        codes: Group of each of them, as a position in ``table``.
        maps: Attributions of the dense model and of the version for these rows, each of shape (m, positions).
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
    version: Version,
    inputs: Tensor,
    targets: Tensor | Sequence[int],
    sensitive_features: Any,
    *,
    null: Sequence[Version] = (),
    method: str = "auto",
    layer: nn.Module | None = None,
    region: Any = None,
    per_group: int = 64,
    internal_batch_size: int = 32,
    max_groups: int = 100,
    random_state: int = 0,
) -> AttributionShift:
    """Compare the attributions of a version with those of the dense model, by group and against a null band.

    Args:
        dense: The dense model; ``dense(inputs)`` gives scores (B,), (B, 1) or (B, C).
        version: Another model, or ``(module, apply)`` where ``apply()`` is a context manager that makes ``module`` the
            version while open (as :class:`groundwire.Variant` does).
        inputs: Shape (n, ...).
        targets: Class whose score is attributed, for each row.
        sensitive_features: Groups of the rows.
        null: Dense models to compare with instead: of other seeds, or fine-tuned.
        method: "auto" is Grad-CAM at the last convolution, where there is one, else input x gradient. Integrated
            gradients cost some 70 forward passes, occlusion 100.
        layer: Layer for Grad-CAM; the last convolution when left out. With another architecture in ``version`` or
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
    chosen = _resolved(method, dense, layer)

    def maps(model: Version) -> Maps:
        module, apply = model if isinstance(model, tuple) else (model, nullcontext)
        with apply(), _evaluating(module):
            at = layer if module is dense else None
            return attributions(module, inputs[rows], labels[rows], chosen, at, internal_batch_size)

    reference = maps(dense)
    mask = None if region is None else _mask(region, inputs)
    own = maps(version)
    found = _measures(reference, own, mask)
    band = [_measures(reference, maps(model), mask) for model in null]
    table = _table(found, band, codes, groups.index)
    return AttributionShift(table, chosen, bool(band), rows, codes, (reference, own))


def attributions(
    module: nn.Module, inputs: Tensor, targets: Tensor, method: str, layer: nn.Module | None, batch: int
) -> Maps:
    """One map for each row: attributions summed over channels, shape (n, positions), by captum."""
    found = [
        _explained(module, inputs[i : i + batch], targets[i : i + batch], method, layer)
        for i in range(0, len(inputs), batch)
    ]
    return np.concatenate(found)


def _explained(module: nn.Module, x: Tensor, y: Tensor, method: str, layer: nn.Module | None) -> Maps:
    from captum import attr

    device = next((p.device for p in module.parameters()), x.device)
    target: Any = y.to(device)

    def scores(batch: Tensor) -> Tensor:
        out: Tensor = module(batch)
        return out[:, None] if out.ndim == 1 else out

    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().to(device).clone().requires_grad_()  # inside: a tensor of inference mode has no gradient
        with torch.no_grad():
            single = scores(x[:1]).shape[1] == 1
        sign = torch.where(target > 0, 1.0, -1.0) if single else torch.ones(len(x), device=device)
        target = torch.zeros_like(target) if single else target
        if method == "gradcam":
            raw = attr.LayerGradCam(scores, layer or last_convolution(module)).attribute(x, target)
            maps = attr.LayerAttribution.interpolate(raw, tuple(x.shape[2:]), "bilinear" if x.ndim == 4 else "nearest")
        elif method == "integrated_gradients":
            maps = attr.IntegratedGradients(scores).attribute(x, target=target, internal_batch_size=max(len(x), 1))
        elif method == "occlusion":
            window = (x.shape[1], *(max(1, s // 6) for s in x.shape[2:]))
            maps = attr.Occlusion(scores).attribute(x, window, strides=window, target=target)
        else:
            maps = attr.InputXGradient(scores).attribute(x, target=target)
    maps = maps.detach() * sign.view(-1, *[1] * (maps.ndim - 1))
    summed = maps.sum(dim=1) if maps.ndim > 2 else maps
    flat: Maps = summed.flatten(1).double().cpu().numpy()
    return flat


def last_convolution(module: nn.Module) -> nn.Module:
    """The last convolution in ``module.modules()``.

    Raises:
        ValueError: There is none.
    """
    found = [m for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not found:
        raise ValueError(f"{type(module).__name__} has no convolution -> use method='input_x_gradient'")
    return found[-1]


def _resolved(method: str, dense: nn.Module, layer: nn.Module | None) -> str:
    if method != "auto":
        return method
    convolutions = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in dense.modules())
    return "gradcam" if layer is not None or convolutions else "input_x_gradient"


class _evaluating(AbstractContextManager[None]):  # noqa: N801 - reads as a statement
    """``module`` in evaluation mode while open, and its gradients and modes as they were afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(m, m.training) for m in module.modules()]
        self.grads = [(p, p.grad) for p in module.parameters()]
        module.eval()

    def __exit__(self, *exception: object) -> None:
        for module, mode in self.modes:
            module.training = mode
        for p, grad in self.grads:
            p.grad = grad


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


def _measures(first: Maps, second: Maps, mask: NDArray[np.bool_] | None) -> dict[str, NDArray[np.float64]]:
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
