"""Adding a vector to a layer's output, without a key in the state dict.

The vector is a non-persistent buffer, so state dicts stay the user's, and it is written in place, so torch.compile
does not recompile. The hook is a module-level function: a bound method would take its object along in every deepcopy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundwire.errors import PluginError

BUFFER = "gw_offset"


def add_offset(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
    """``output`` plus the layer's offset, in the output's dtype; without the buffer, ``output``."""
    vector = getattr(layer, BUFFER, None)
    return output if vector is None else output + along_scores(layer, vector).to(output.dtype)


def along_scores(layer: nn.Module, vector: Tensor) -> Tensor:
    """``vector`` shaped to broadcast over the layer's output: (K,) for a Linear, (K, 1, ...) for a Conv.

    Example:
        >>> along_scores(nn.Conv2d(1, 3, 1), torch.zeros(3)).shape
        torch.Size([3, 1, 1])
    """
    spatial = len(getattr(layer, "kernel_size", ()))
    return vector.reshape(-1, *[1] * spatial)


@contextmanager
def offset_on(layer: nn.Module) -> Iterator[None]:
    """A zero offset on ``layer`` while open."""
    weight = next(layer.parameters())
    layer.register_buffer(BUFFER, torch.zeros(outputs_of(layer), device=weight.device), persistent=False)
    handle = layer.register_forward_hook(add_offset)
    try:
        yield
    finally:
        handle.remove()
        delattr(layer, BUFFER)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` or a part of it runs through torch.compile, which may have been called before a hook came."""
    return any(
        type(m).__name__ == "OptimizedModule"
        or getattr(m, "_compiled_call_impl", None) is not None
        or getattr(m, "_compiler_ctx", None) is not None
        for m in module.modules()
    )


def moves_scores(layer: nn.Module, forward: Callable[[], Tensor]) -> bool:
    """Whether the offset of ``layer`` reaches what ``forward()`` returns. The offset is afterwards as before."""
    vector = getattr(layer, BUFFER)
    before = vector.clone()
    with torch.no_grad():
        plain = forward()
        vector.add_(1 + plain.abs().max().to(vector.dtype))
        moved = forward()
        vector.copy_(before)
    return not torch.equal(plain, moved)


def outputs_of(layer: nn.Module) -> int:
    """Number of scores that ``layer`` gives."""
    name = "out_features" if hasattr(layer, "out_features") else "out_channels"
    return int(getattr(layer, name))


def write_offset(layer: nn.Module, vector: Tensor) -> None:
    """Set the offset of ``layer``.

    Raises:
        PluginError: ``vector`` is not of shape (K,).
    """
    if tuple(vector.shape) != (outputs_of(layer),):
        raise PluginError(f"an offset of shape {tuple(vector.shape)} does not fit {layer} -> give one of shape (K,)")
    with torch.no_grad():
        getattr(layer, BUFFER).copy_(vector)
