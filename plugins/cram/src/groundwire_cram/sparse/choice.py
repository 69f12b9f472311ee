"""Dense or sparse, for one layer, by measuring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from groundwire_cram.sparse import semi_structured
from groundwire_cram.sparse.csr import TILE
from groundwire_cram.sparse.fitness import Dense
from groundwire_cram.sparse.layers import SparseConv, SparseLayer, SparseLinear
from groundwire_cram.sparse.report import LayerRow
from groundwire_cram.sparse.timing import MARGIN, Measure, Timing, summary
from groundwire_cram.sparse.watch import Layout, Watched


def choose(
    row: LayerRow, layer: Dense, met: Watched, min_speedup: float, measure: Measure
) -> tuple[LayerRow, nn.Module | None]:
    """The report's row for ``layer``, and the sparse layer that takes its place, if one does."""
    reason = _refusal(layer, met)
    if reason is not None:
        return replace(row, reason=reason), None
    try:
        candidates = _candidates(layer, [batch(layer, layout) for layout in met.inputs])
    except RuntimeError as error:
        return replace(row, reason=str(error)), None
    measured = [(_slowest(layer, sparse, met.inputs, measure), sparse) for sparse in candidates]
    (time, layout), best = max(measured, key=lambda found: found[0][0].certain)
    row = replace(
        row,
        sparse_bytes=_bytes(best),
        batch=batch(layer, layout),
        dense_seconds=time.dense,
        sparse_seconds=time.sparse,
        speedup=time.speedup,
    )
    if time.certain < MARGIN * min_speedup:
        return replace(row, reason=f"not faster for certain by {min_speedup:g} and a margin of {MARGIN:g}"), None
    return replace(row, decision=_name(best, row.batch), reason="measured faster"), best


def batch(layer: Dense, layout: Layout) -> int:
    """Rows that a Linear layer gets, or positions that a 1x1 convolution computes.

    Example:
        >>> batch(nn.Conv1d(2, 2, 1, stride=2), Layout((3, 2, 5), (10, 5, 1), torch.float32, torch.device("cpu")))
        9
    """
    if isinstance(layer, nn.Linear):
        return math.prod(layout.shape[:-1])
    dims = len(layer.stride)
    sizes = [-(-size // step) for size, step in zip(layout.shape[-dims:], layer.stride, strict=True)]
    return math.prod([*layout.shape[: -dims - 1], *sizes])


def _refusal(layer: Dense, met: Watched) -> str | None:
    if met.read:
        return "its weight is read outside its own forward"
    if not met.inputs:
        return "not called for example_input"
    if any(layout.dtype != layer.weight.dtype for layout in met.inputs):
        return f"its input is not {layer.weight.dtype}"
    batches = [batch(layer, layout) for layout in met.inputs]
    return "its input is empty" if 0 in batches else None


def _candidates(layer: Dense, batches: Sequence[int]) -> list[nn.Module]:
    """What could take the layer's place; an error tells why there is nothing."""
    if isinstance(layer, nn.Linear) and layer.weight.device.type == "cuda":
        return [semi_structured.converted(layer)]
    fused = _sparse(layer, TILE)
    candidates: list[nn.Module] = []
    try:
        fused.use_compiled()
        candidates.append(fused)
    except RuntimeError as error:
        if 1 in batches:  # Where the product of MKL is no match for a dense one.
            raise RuntimeError(f"batch 1: {error}") from error
    if 1 not in batches:
        tiles: Sequence[int | None] = (TILE,) if max(batches) <= TILE else (TILE, None)
        candidates += [_sparse(layer, tile) for tile in tiles]
    return candidates


def _sparse(layer: Dense, tile: int | None) -> SparseLayer:
    if isinstance(layer, nn.Linear):
        return SparseLinear(layer.weight, layer.bias, tile).eval()
    return SparseConv(layer.weight, layer.bias, tuple(layer.stride), tile).eval()


def _slowest(layer: Dense, sparse: nn.Module, layouts: Sequence[Layout], measure: Measure) -> tuple[Timing, Layout]:
    timings = []
    for layout in layouts:
        x = layout.random()
        with torch.no_grad():
            timings.append((summary(measure(lambda x=x: layer(x), lambda x=x: sparse(x))), layout))  # type: ignore[misc]
    return min(timings, key=lambda found: found[0].certain)


def _bytes(sparse: nn.Module) -> int:
    if isinstance(sparse, SparseLayer):
        return sparse.bytes
    return semi_structured.size(sparse)


def _name(sparse: nn.Module, rows: int | None) -> str:
    if not isinstance(sparse, SparseLayer):
        return "2:4"
    if not sparse.is_compiled:
        return "csr"
    return "gather" if rows == 1 else "compiled"
