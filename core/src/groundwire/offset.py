"""Adding a vector to a layer's output, without a key in the state dict.

The vector is a non-persistent buffer, so state dicts stay the user's, and it is written in place, so torch.compile
does not recompile. The hook is a module-level function: a bound method would take its object along in every deepcopy.
Vectors that differ from row to row are a plain attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundwire.errors import PluginError

BUFFER, ROWS = "gw_offset", "gw_offset_rows"


def add_offset(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
    """``output`` plus the layer's offset; without the buffer, ``output``.

    The offset is float32 and promotes a half-precision output: rounded to bfloat16, it would be off by up to 1 %.
    """
    rows = getattr(layer, ROWS, None)
    if rows is not None:
        return output + rows_along_scores(layer, rows, output)
    vector = getattr(layer, BUFFER, None)
    return output if vector is None else output + along_scores(layer, vector)


def along_scores(layer: nn.Module, vector: Tensor) -> Tensor:
    """``vector`` shaped to broadcast over the layer's output: (K,) for a Linear, (K, 1, ...) for a Conv.

    Example:
        >>> along_scores(nn.Conv2d(1, 3, 1), torch.zeros(3)).shape
        torch.Size([3, 1, 1])
    """
    if isinstance(layer, nn.Linear):  # to ask a module for what it lacks is slow
        return vector
    spatial = len(getattr(layer, "kernel_size", ()))
    return vector.reshape(-1, *[1] * spatial)


def rows_along_scores(layer: nn.Module, rows: Tensor, output: Tensor) -> Tensor:
    """``rows`` (B, K) shaped to broadcast over ``output``: (B, 1, ..., K) for a Linear, (B, K, 1, ...) for a Conv.

    Raises:
        PluginError: ``output`` has another number of rows.

    Example:
        >>> rows_along_scores(nn.Linear(2, 3), torch.zeros(5, 3), torch.zeros(5, 7, 3)).shape
        torch.Size([5, 1, 3])
    """
    if len(rows) != len(output):
        raise PluginError(
            f"a forward pass of {len(output)} rows in a batch whose {len(rows)} rows have offsets of their own -> "
            "make batches whose rows share one offset"
        )
    between = [1] * (output.dim() - 2)
    return (
        rows.reshape(len(rows), -1, *between)
        if hasattr(layer, "kernel_size")
        else rows.reshape(len(rows), *between, -1)
    )


def offset_of(layer: nn.Module, output: Tensor) -> Tensor:
    """The layer's offset, float32, shaped to broadcast over ``output``."""
    rows = getattr(layer, ROWS, None)
    found = rows_along_scores(layer, rows, output) if rows is not None else along_scores(layer, getattr(layer, BUFFER))
    return found.float()


@contextmanager
def offset_on(layer: nn.Module) -> Iterator[None]:
    """A zero offset on ``layer`` while open."""
    weight = next(layer.parameters())
    layer.register_buffer(
        BUFFER, torch.zeros(outputs_of(layer), dtype=torch.float32, device=weight.device), persistent=False
    )
    setattr(layer, ROWS, None)
    handle = layer.register_forward_hook(add_offset)
    try:
        yield
    finally:
        handle.remove()
        delattr(layer, BUFFER)
        delattr(layer, ROWS)


def offsets_in(module: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Each corrected layer with a copy of its offset as it is now: of shape (K,), or (B, K) for rows that differ.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> with offset_on(net[0]):
        ...     write_offset(net[0], torch.ones(3))
        ...     [(layer, offset)] = offsets_in(net)
        >>> layer is net[0], offset.tolist()
        (True, [1.0, 1.0, 1.0])
    """
    corrected = [layer for layer in module.modules() if BUFFER in layer._buffers]
    return [(layer, _current(layer).clone()) for layer in corrected]


def _current(layer: nn.Module) -> Tensor:
    rows = getattr(layer, ROWS)
    found: Tensor = getattr(layer, BUFFER) if rows is None else rows
    return found


def forget_rows(layer: nn.Module) -> None:
    """The batch whose rows had offsets of their own is over."""
    if getattr(layer, ROWS, None) is not None:
        setattr(layer, ROWS, None)


def is_corrected(layer: nn.Module) -> bool:
    """Whether a run adds something other than zero to the scores of ``layer``.

    Example:
        >>> is_corrected(nn.Linear(2, 3))
        False
    """
    vector = getattr(layer, BUFFER, None)
    return vector is not None and (bool(vector.any()) or getattr(layer, ROWS, None) is not None)


def without_offset(module: nn.Module) -> None:
    """Take the offset, and the hook that adds it, off a copy of a module that was made during a run."""
    for layer in module.modules():
        if hasattr(layer, BUFFER):
            delattr(layer, BUFFER)
            delattr(layer, ROWS)
            for key in [key for key, hook in layer._forward_hooks.items() if hook is add_offset]:
                del layer._forward_hooks[key]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` or a part of it runs through torch.compile, which may have been called before a hook came.

    Example:
        >>> is_compiled(nn.Linear(2, 3))
        False
    """
    return any(
        type(m).__name__ == "OptimizedModule"
        or getattr(m, "_compiled_call_impl", None) is not None
        or getattr(m, "_compiler_ctx", None) is not None
        for m in module.modules()
    )


def moves_scores(layer: nn.Module, forward: Callable[[], Tensor]) -> bool:
    """Whether the offset of ``layer`` reaches what ``forward()`` returns. The offset is afterwards as before."""
    vector = getattr(layer, BUFFER)
    before, rows = vector.clone(), getattr(layer, ROWS)
    setattr(layer, ROWS, None)
    with torch.no_grad():
        plain = forward()
        vector.add_(1 + plain.abs().max().to(vector.dtype))
        moved = forward()
        vector.copy_(before)
    setattr(layer, ROWS, rows)
    return not torch.equal(plain, moved)


def outputs_of(layer: nn.Module) -> int:
    """Number of scores that ``layer`` gives.

    Example:
        >>> outputs_of(nn.Linear(2, 3)), outputs_of(nn.Conv2d(1, 4, 3))
        (3, 4)
    """
    name = "out_features" if hasattr(layer, "out_features") else "out_channels"
    return int(getattr(layer, name))


def write_offset(layer: nn.Module, vector: Tensor) -> None:
    """Set the offset of ``layer``: of shape (K,), or (B, K) for rows that differ.

    Raises:
        PluginError: ``vector`` is of another shape, or not finite.
    """
    if vector.dim() not in (1, 2) or vector.shape[-1] != outputs_of(layer):
        raise PluginError(
            f"an offset of shape {tuple(vector.shape)} does not fit {layer} -> give one of shape (K,) or (B, K)"
        )
    if vector.device.type == "cpu" and not (math.isfinite(vector.sum()) or bool(torch.isfinite(vector).all())):
        # On another device the question would wait for it, at every step. A finite sum answers it sooner.
        raise PluginError(f"an offset for {layer} has values that are not finite -> clamp the priors away from zero")
    buffer = getattr(layer, BUFFER)
    rows = vector.detach().to(buffer.device, torch.float32) if vector.dim() == 2 else None
    if rows is not None or getattr(layer, ROWS) is not None:  # an attribute of a module is slow to set
        setattr(layer, ROWS, rows)
    if rows is None:
        buffer.copy_(vector.detach())
