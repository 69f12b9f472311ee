"""Dense or sparse, and by which product, for one layer: whatever is measured to be faster, beyond doubt."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from groundwire_cram.sparse import semi_structured
from groundwire_cram.sparse.eligibility import Dense, is_transposed
from groundwire_cram.sparse.layers import SparseConv, SparseLayer, SparseLinear
from groundwire_cram.sparse.observer import InputLayout, Observed
from groundwire_cram.sparse.products import TILE
from groundwire_cram.sparse.report import LayerRow

#: What the faster way must be ahead by, so that noise does not decide.
MARGIN = 1.05
#: Rounds at least and at most, and the seconds after which there is no further one.
_FEWEST, _MOST, _BUDGET = 9, 60, 0.3
#: 99 % of a normal distribution are below this many standard deviations.
_NORMAL_99 = 2.33
#: A round repeats a call until it takes this many seconds, because clocks and caches disturb short ones.
_ROUND = 1e-3

#: Takes two ways and returns, for each of some rounds, the seconds of a call of each.
Measure = Callable[[Callable[[], Any], Callable[[], Any]], Sequence[tuple[float, float]]]


class Timing(NamedTuple):
    """Seconds of a call: medians over the rounds; ``certain`` is what the median speed-up exceeds with 99 %."""

    dense: float
    sparse: float
    speedup: float
    certain: float


def measure(dense: Callable[[], Any], sparse: Callable[[], Any]) -> list[tuple[float, float]]:
    """Return the seconds of a call of each, measured in turn, so that a drift of the machine hits both alike.

    With one torch thread on the CPU these are seconds of processor time, else of the wall clock.
    """
    calls = []
    for way in (dense, sparse):
        way()  # The first call is slower for reasons of its own.
        calls.append(max(1, round(_ROUND / max(_seconds(way, 1), 1e-9))))
    rounds: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(rounds) < _FEWEST or (len(rounds) < _MOST and time.perf_counter() - start < _BUDGET):
        if len(rounds) % 2:
            second = _seconds(sparse, calls[1])
            rounds.append((_seconds(dense, calls[0]), second))
        else:
            rounds.append((_seconds(dense, calls[0]), _seconds(sparse, calls[1])))
    return rounds


def summary(rounds: Sequence[tuple[float, float]]) -> Timing:
    """Return what the rounds say.

    The bound is an order statistic of the rounds' ratios (the sign test), so that outliers, which other programs on the
    machine cause, count as one round each. With few rounds it is the smallest ratio.

    Example:
        >>> summary([(2.0, 1.0), (2.0, 1.0), (3.0, 1.0), (1.5, 1.0)])
        Timing(dense=2.0, sparse=1.0, speedup=2.0, certain=1.5)
    """
    if not rounds:
        raise ValueError("measure returned no rounds -> return a list of (seconds dense, seconds sparse)")
    ratios = sorted(dense / sparse for dense, sparse in rounds)
    certain = ratios[max(0, int(len(ratios) / 2 - _NORMAL_99 * math.sqrt(len(ratios)) / 2))]
    dense, sparse = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return Timing(dense, sparse, statistics.median(ratios), certain)


def _seconds(way: Callable[[], Any], calls: int) -> float:
    clock = _clock()
    _wait()
    start = clock()
    for _ in range(calls):
        way()
    _wait()
    return (clock() - start) / calls


def _clock() -> Callable[[], float]:
    """Return the clock: a thread alone on the CPU has one that stands still while other programs run."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return time.thread_time if alone else time.perf_counter


def _wait() -> None:
    """Wait for a GPU, which returns before it is done."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def choose(
    row: LayerRow, layer: Dense, observed: Observed, min_speedup: float, measure: Measure
) -> tuple[LayerRow, nn.Module | None]:
    """Return the report's row for ``layer``, and the sparse layer that takes its place, if one does."""
    reason = _refusal(layer, observed)
    if reason is not None:
        return replace(row, reason=reason), None
    try:
        candidates = _candidates(layer, [batch(layer, layout) for layout in observed.inputs])
    except RuntimeError as error:
        return replace(row, reason=str(error)), None
    measured = [(_slowest(layer, sparse, observed.inputs, measure), sparse) for sparse in candidates]
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


def batch(layer: Dense, layout: InputLayout) -> int:
    """Return the rows that a Linear layer gets, or positions that a 1x1 convolution computes.

    Example:
        >>> batch(nn.Conv1d(2, 2, 1, stride=2), InputLayout((3, 2, 5), (10, 5, 1), torch.float32, torch.device("cpu")))
        9
    """
    if isinstance(layer, nn.Linear) or is_transposed(layer):
        return math.prod(layout.shape[:-1])
    dims = len(layer.stride)
    sizes = [-(-size // step) for size, step in zip(layout.shape[-dims:], layer.stride, strict=True)]
    return math.prod([*layout.shape[: -dims - 1], *sizes])


def _refusal(layer: Dense, observed: Observed) -> str | None:
    if observed.read:
        return "its weight is read outside its own forward"
    if not observed.inputs:
        return "not called for example_input"
    if any(layout.dtype != layer.weight.dtype for layout in observed.inputs):
        return f"its input is not {layer.weight.dtype}"
    batches = [batch(layer, layout) for layout in observed.inputs]
    return "its input is empty" if 0 in batches else None


def _candidates(layer: Dense, batches: Sequence[int]) -> list[nn.Module]:
    """Return what could take the layer's place; an error tells why there is nothing."""
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
    if is_transposed(layer):
        sparse = SparseLinear(layer.weight.t(), layer.bias, tile).eval()
        sparse.transposed = type(layer)
        return sparse
    if isinstance(layer, nn.Linear):
        return SparseLinear(layer.weight, layer.bias, tile).eval()
    return SparseConv(layer.weight, layer.bias, tuple(layer.stride), tile).eval()


def _slowest(
    layer: Dense, sparse: nn.Module, layouts: Sequence[InputLayout], measure: Measure
) -> tuple[Timing, InputLayout]:
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
