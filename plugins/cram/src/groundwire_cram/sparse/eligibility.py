"""Layers that can be replaced at all, and the obstacles of others: said from the outside, before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from groundwire_cram.sparse import semi_structured

Dense = Any  # nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, or the Conv1D of transformers
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Above this density nothing was measured to be faster than dense, so measuring would be waste.
DENSEST = 0.7
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layers(module: nn.Module) -> dict[str, Dense]:
    """Return all Linear layers and convolutions by name, each once.

    Example:
        >>> list(layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(2, 2, 1))))
        ['0', '2']
    """
    return {name: m for name, m in module.named_modules() if isinstance(m, KINDS) or is_transposed(m)}


def is_transposed(module: nn.Module) -> bool:
    """Return whether ``module`` is the Conv1D of transformers: a Linear layer whose weight is (in, out)."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def density(layer: Dense) -> float:
    """Return nonzero weights divided by all.

    Example:
        >>> density(nn.Linear(4, 4))
        1.0
    """
    weight: Tensor = layer.weight
    return int((weight.detach() != 0).sum()) / max(1, weight.numel())


def obstacles(module: nn.Module) -> dict[str, str]:
    """Say why a layer must stay as it is, by name; layers that may be replaced are left out.

    Example:
        >>> obstacles(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3)).eval())
        {'0': 'density above 0.7', '1': 'kernel (3, 3), only 1x1 is supported'}
    """
    tied, compiled = _tied(module), set(_compiled(module))
    found: dict[str, str] = {}
    for name, layer in layers(module).items():
        reason = "inside a module of torch.compile -> sparsify first, then compile" if id(layer) in compiled else None
        reason = reason or _altered(layer) or _of_the_kernel(layer) or _of_the_weight(layer)
        if reason is None and id(layer.weight) in tied:
            reason = "weight tied to another layer"
        if reason is None and density(layer) > DENSEST:
            reason = f"density above {DENSEST:g}"
        if reason is not None:
            found[name] = reason
    return found


def _altered(layer: Dense) -> str | None:
    if torch.nn.utils.parametrize.is_parametrized(layer):
        return "parametrized -> torch.nn.utils.parametrize.remove_parametrizations first"
    if type(layer) not in KINDS and not is_transposed(layer):
        return f"{type(layer).__name__} is a class of its own, which may do something else"
    if "weight" not in layer._parameters or layer.weight is None:
        return "weight is computed from others -> torch.nn.utils.prune.remove or remove_weight_norm first"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return "has hooks, which would be lost"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    return "in training mode" if layer.training else None


def _of_the_kernel(layer: Dense) -> str | None:
    if isinstance(layer, nn.Linear) or is_transposed(layer):
        return None
    if any(size != 1 for size in layer.kernel_size):
        return f"kernel {tuple(layer.kernel_size)}, only 1x1 is supported"
    if layer.groups != 1:
        return f"groups={layer.groups}, only 1 is supported"
    padded = not isinstance(layer.padding, str) and any(layer.padding)
    return f"padding {tuple(layer.padding)}, only 0 is supported" if padded else None


def _of_the_weight(layer: Dense) -> str | None:
    weight: Tensor = layer.weight
    if type(weight.data) is not Tensor or weight.layout != torch.strided:
        return f"weight is a {type(weight.data).__name__} of layout {weight.layout}"
    if weight.device.type == "cuda":
        return semi_structured.obstacle(layer)
    if weight.device.type != "cpu":
        return f"on {weight.device}, sparse products are for the CPU, and 2:4 for CUDA"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"{weight.dtype}, on the CPU only float32 and float64 are supported"
    return None


def _tied(module: nn.Module) -> set[int]:
    holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    return {key for key, count in holders.items() if count > 1}


def _compiled(module: nn.Module) -> Iterator[int]:
    for inner in module.modules():
        if is_compiled(inner):
            yield from map(id, inner.modules())


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module`` went through ``torch.compile``, as a function or a method.

    Example:
        >>> is_compiled(nn.Linear(2, 2))
        False
    """
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
