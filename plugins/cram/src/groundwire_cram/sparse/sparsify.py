"""From pruned to sparse layers and back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from groundwire_cram.sparse import eligibility, observer, semi_structured, transformer
from groundwire_cram.sparse.autotune import Measure, choose
from groundwire_cram.sparse.autotune import measure as measure_in_turn
from groundwire_cram.sparse.layers import SparseConv, SparseLayer, move_together
from groundwire_cram.sparse.products import load_numba
from groundwire_cram.sparse.report import LayerRow, SparsityReport

_REPORT = "_sparsity_report"


def sparsify(
    module: nn.Module,
    example_input: Any,
    *,
    min_speedup: float = 1.0,
    inplace: bool = False,
    progress: bool = True,
    measure: Measure = measure_in_turn,
) -> nn.Module:
    """Make pruned layers sparse where that is measured to be faster on this machine, and leave all others dense.

    One forward of ``example_input`` tells what each Linear layer and 1x1 convolution (any stride, no padding, groups 1)
    gets; each pruned one is then timed dense and sparse, in turn, with inputs of that shape and torch's current number
    of threads. It becomes sparse only if it is faster by more than 5 %, with 99 % certainty. The result is for
    inference: same outputs up to the order of summation, no gradients. A batch of another size than the example's is
    computed rightly too, but how fast was not measured: give the example the size that will be served.

    Layers stay dense, and the report says why, if something else depends on them: tied or parametrized weights, hooks,
    ``torch.compile``, a weight that is read outside the layer's forward (as torch's attention layers do). Layers inside
    an encoder layer of torch, which runs fused, become sparse only if that is faster than the fused whole.
    On CUDA, Linear layers in float16 or bfloat16 with the pattern 2:4 use torch's semi-structured tensors.

    Args:
        module: A pruned module in evaluation mode.
        example_input: One batch as it will be served: a tensor, a tuple of positional arguments or a dict by name.
        min_speedup: What a layer must gain to become sparse, at least 1.
        inplace: Replace layers in ``module`` itself instead of a copy.
        progress: Show a progress bar while measuring, if there is a terminal.
        measure: ``measure(dense, sparse)`` returns the seconds of a call of each, for some rounds.

    Returns:
        The module; :func:`sparsity_report` tells what became of each layer.

    Raises:
        TypeError: ``module`` or ``example_input`` is of another type.
        ValueError: ``module`` is in training mode or compiled, cannot run on the example, or ``min_speedup`` is wrong.

    Example:
        >>> layer = nn.Linear(64, 64).eval()
        >>> _ = nn.init.sparse_(layer.weight, 0.9)
        >>> fast = sparsify(layer, torch.randn(8, 64), measure=lambda dense, sparse: [(2.0, 1.0)])
        >>> fast
        SparseLinear(64, 64, density=0.0938, bias=True)
        >>> sparsity_report(fast)[""].speedup
        2.0
    """
    _check(module, min_speedup, inplace)
    module = densify(module, inplace=inplace)
    transformer.unfuse(module)
    layers, obstacles = eligibility.layers(module), eligibility.obstacles(module)
    fit = {name: layer for name, layer in layers.items() if name not in obstacles}
    rows: dict[str, LayerRow] = {name: _row(name, layer, obstacles.get(name)) for name, layer in layers.items()}
    new: dict[int, nn.Module] = {}
    bar = Console(stderr=True)
    try:
        with transformer.calls(module) as called:
            observed = observer.observe(module, fit.values(), example_input)
        for name, layer in track(
            fit.items(), "sparsify", console=bar, transient=True, disable=not (progress and bar.is_terminal)
        ):
            rows[name], sparse = choose(rows[name], layer, observed[id(layer)], min_speedup, measure)
            if sparse is not None:
                new[id(layer)] = sparse
        for name in transformer.slower(module, new, called, min_speedup, measure):
            del new[id(layers[name])]
            rows[name] = replace(
                rows[name], decision="dense", reason="the encoder layer around it is faster as torch fuses it"
            )
    except BaseException:
        transformer.fuse(module)
        raise
    kernels = load_numba() if any(layer.weight.device.type == "cpu" for layer in fit.values()) else None
    note = kernels if isinstance(kernels, str) else ""
    report = SparsityReport(tuple(rows.values()), torch.get_num_threads(), note)
    _tell(module, report, fit)
    module = _replaced(module, new)
    setattr(module, _REPORT, report)
    if new and not isinstance(module, SparseLayer):
        module.__dict__["_apply"] = partial(move_together, module)
    return module


def densify(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Put ordinary layers in place of sparse ones: to train, export, change dtype or move to another device.

    Args:
        module: A module, sparsified or not.
        inplace: Replace layers in ``module`` itself instead of a copy.

    Returns:
        The module with the same weights, zeros included, all of them trainable.

    Example:
        >>> from groundwire_cram.sparse import SparseLinear
        >>> densify(SparseLinear(torch.eye(2), None)).weight
        Parameter containing:
        tensor([[1., 0.],
                [0., 1.]], requires_grad=True)
    """
    module = module if inplace else copy.deepcopy(module)
    new: dict[int, nn.Module] = {id(m): _dense(m) for m in module.modules() if isinstance(m, SparseLayer)}
    for layer in module.modules():
        if semi_structured.is_converted(layer):
            layer.weight = nn.Parameter(layer.weight.data.to_dense())  # type: ignore[operator]
    transformer.fuse(module)
    module.__dict__.pop(_REPORT, None)
    module.__dict__.pop("_apply", None)
    return _replaced(module, new)


def sparsity_report(module: nn.Module) -> SparsityReport:
    """Return what :func:`sparsify` measured and decided for each layer; before it, their densities only.

    Example:
        >>> print(sparsity_report(nn.Linear(2, 3))[""].density)
        1.0
    """
    report = getattr(module, _REPORT, None)
    if isinstance(report, SparsityReport):
        return report
    layers, obstacles = eligibility.layers(module), eligibility.obstacles(module)
    rows = tuple(_row(name, layer, obstacles.get(name)) for name, layer in layers.items())
    return SparsityReport(rows, torch.get_num_threads())


def _check(module: Any, min_speedup: Any, inplace: bool) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(min_speedup, Real) or not 1 <= float(min_speedup) < math.inf:
        raise ValueError(f"min_speedup must be a number of at least 1, got {min_speedup!r}")
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule) or eligibility.is_compiled(module):
        raise ValueError(f"{name} is compiled, its layers cannot be replaced -> sparsify first, then compile")
    if module.training:
        raise ValueError(f"{name} is in training mode, sparse layers are for inference -> call module.eval() first")
    if inplace and isinstance(module, (*eligibility.KINDS, SparseLayer)):
        raise ValueError(f"{name} is itself the layer, it cannot be replaced in place -> use what sparsify returns")


def _row(name: str, layer: eligibility.Dense, reason: str | None) -> LayerRow:
    size = layer.weight.numel() * layer.weight.element_size()
    density = eligibility.density(layer)
    row = LayerRow(name, type(layer).__name__, tuple(layer.weight.shape), density, size, size)
    return row if reason is None else LayerRow(**{**vars(row), "reason": reason})


def _tell(module: nn.Module, report: SparsityReport, fit: dict[str, Any]) -> None:
    if report.sparse:
        return
    name = type(module).__name__
    found = "; ".join(f"{row.name or name}: density {row.density:.2f}, {row.reason}" for row in report.rows[:8])
    more = f" and {len(report.rows) - 8} more" if len(report.rows) > 8 else ""
    hint = "sparsity_report(module) has all" if fit else "prune(module, 0.9) first"
    what = f"{found}{more}" if found else "it has no Linear layer and no convolution"
    warnings.warn(f"sparsify left {name} as it is: {what} -> {hint}", stacklevel=3)


def _replaced(module: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]
    return new.get(id(module), module)


def _dense(layer: SparseLayer) -> nn.Module:
    out, into, *kernel = layer.shape
    if layer.transposed is not None:
        dense: nn.Module = layer.transposed(out, into)
        dense.weight, dense.bias = nn.Parameter(layer.weight), nn.Parameter(layer.bias.clone())  # type: ignore[union-attr]
        return dense.train(layer.training)
    bias, weight = layer.bias is not None, layer.weight
    make: Callable[..., nn.Module] = nn.Linear
    sizes: dict[str, Any] = {}
    if isinstance(layer, SparseConv):
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        sizes = {"kernel_size": 1, "stride": layer.stride}
    dense = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        make, into, out, bias=bias, dtype=weight.dtype, **sizes
    )
    dense.weight = nn.Parameter(weight)
    if bias:
        dense.bias = nn.Parameter(layer.bias.clone())  # type: ignore[union-attr]
    return dense.train(layer.training)
