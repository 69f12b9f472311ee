"""Versions of the model to compare with, where no other plugin offers any: magnitude pruning by torch itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from groundwire import PluginError, Variant


def checked_variants(variants: Any) -> bool | tuple[float | Variant, ...]:
    """``BiasAudit(variants=...)``: True, False, or a list of sparsities and :class:`groundwire.Variant`.

    Raises:
        ValueError: An entry is neither, or a sparsity is outside (0, 1).

    Example:
        >>> checked_variants([0.5, 0.9])
        (0.5, 0.9)
    """
    if isinstance(variants, bool):
        return variants
    entries = [variants] if isinstance(variants, Real | Variant) else list(variants)
    for entry in entries:
        if isinstance(entry, Variant):
            continue
        if isinstance(entry, bool) or not isinstance(entry, Real) or not 0 < float(entry) < 1:
            raise ValueError(f"variants must hold sparsities in (0, 1) or Variant objects, got {entry!r}")
    return tuple(entry if isinstance(entry, Variant) else float(entry) for entry in entries)


def requested(module: nn.Module, entries: Sequence[float | Variant]) -> list[Variant]:
    """The user's own list, sparsities as magnitude-pruned versions of ``module``."""
    return [e if isinstance(e, Variant) else Variant(f"{e:g}", partial(pruned, module, e)) for e in entries]


@contextmanager
def pruned(module: nn.Module, sparsity: float) -> Iterator[nn.Module]:
    """``module`` with its smallest weights set to zero while open; the weights are put back, whatever happens.

    Global unstructured L1 pruning by ``torch.nn.utils.prune`` over all parameters of more than one dimension.
    BatchNorm statistics stay those of the dense model.

    Args:
        module: Any module.
        sparsity: Share of those weights to prune.

    Raises:
        PluginError: ``module`` has no such parameter.

    Example:
        >>> layer = nn.Linear(4, 5)
        >>> with pruned(layer, 0.5):
        ...     int((layer.weight == 0).sum())
        10
        >>> int((layer.weight == 0).sum())
        0
    """
    weights = [p for p in module.parameters() if p.dim() > 1]
    if not weights:
        raise PluginError(f"{type(module).__name__} has no weight of more than one dimension to prune")
    saved = [p.detach().clone() for p in weights]
    try:
        with torch.no_grad():
            # torch prunes attributes of modules; one that only holds the magnitudes leaves the model's own untouched.
            flat = torch.cat([p.detach().abs().flatten() for p in weights])
            mask = prune.L1Unstructured(sparsity).compute_mask(flat, torch.ones_like(flat))  # type: ignore[no-untyped-call]
            for p, part in zip(weights, mask.split([p.numel() for p in weights]), strict=True):
                p.mul_(part.view_as(p))
        yield module
    finally:
        with torch.no_grad():
            for p, values in zip(weights, saved, strict=True):
                p.copy_(values)
