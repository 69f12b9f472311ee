"""Giving plain layers of torch.nn a weight of spectral norm at most 1, and baking it back."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from groundwire_aol.errors import UnsoundError
from groundwire_aol.functional import Geometry, Side
from groundwire_aol.parametrization import AOLParametrization, aol_of

_Layer = TypeVar("_Layer", bound=nn.Module)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
#: What may carry the parametrization; subclasses may compute something else.
LAYERS = (nn.Linear, *CONVOLUTIONS)


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a Linear or (transposed) convolution layer.

    Raises:
        UnsoundError: The padding can repeat input pixels, so that no bound on the kernel bounds the layer.

    Example:
        >>> geometry_of(nn.Conv1d(2, 2, 3, stride=2)).phases
        (2,)
    """
    if isinstance(layer, nn.Linear):
        return Geometry()
    assert isinstance(layer, CONVOLUTIONS)
    mode = layer.padding_mode
    if mode not in ("zeros", "circular"):
        raise UnsoundError(
            f"padding_mode {mode!r} repeats border pixels: {_REPEATS[mode]} -> use 'zeros' or 'circular'"
        )
    if mode == "circular":
        _refuse_wrapping_twice(layer)
    transposed = isinstance(layer, TRANSPOSED)
    return Geometry(tuple(layer.stride), tuple(layer.dilation), layer.groups, transposed, mode == "circular")


_REPEATS = {
    "reflect": "a 3 x 3 kernel with padding 1 reached norm 1.068, and up to 2 is possible",
    "replicate": "a 3 x 3 kernel with padding 1 reached norm 1.006, a 1 x 1 kernel 2.0",
}


def _refuse_wrapping_twice(layer: Any) -> None:
    if isinstance(layer.padding, str):
        return
    for size, dilation, padding in zip(layer.kernel_size, layer.dilation, layer.padding, strict=True):
        if 2 * padding > dilation * (size - 1):
            raise UnsoundError(
                f"circular padding {padding} on both sides of a kernel of size {size}, dilation {dilation}, computes "
                "outputs twice: norm 1.43 was measured for size 3 with padding 2, and 2.0 for size 1 with padding 1 -> "
                f"at most dilation * (size - 1) in all, such as {dilation * (size - 1) // 2}"
            )


def constrain(
    layer: _Layer, steps: int = 1, *, side: Side = "auto", compat: Literal["reference"] | None = None
) -> _Layer:
    """Give a Linear or convolution layer a weight of spectral norm at most 1, in place; its weight becomes the raw one.

    Plain checkpoints still load. ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")`` bakes it.

    Args:
        layer: A torch.nn Linear, Conv or ConvTranspose layer, or a subclass that computes the same.
        steps: 1, or 2 for the tighter rule.
        side: Channels to scale; "auto" for the fewer.
        compat: "reference" for the published rule.

    Raises:
        UnsoundError: The padding allows no bound.
        TypeError: ``layer`` is of another kind.

    Example:
        >>> layer = constrain(nn.Linear(3, 3))
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1)
        True
    """
    if not computes_linear(layer):
        raise TypeError(f"{type(layer).__name__} is not a Linear or convolution layer of torch.nn")
    if aol_of(layer) is None:
        rule = AOLParametrization(geometry_of(layer), steps, side, compat)
        rule.to(device=layer.weight.device)  # type: ignore[arg-type]
        rule.train(layer.training)
        # "unsafe" only skips torch's trial runs of the rule, which keeps shape and dtype.
        parametrize.register_parametrization(layer, "weight", rule, unsafe=True)
        layer.register_load_state_dict_pre_hook(_take_plain_weight)  # type: ignore[no-untyped-call]
    return layer


def computes_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is one of torch's Linear and convolution layers and computes what they do."""
    for cls in LAYERS:
        if isinstance(layer, cls):
            same = all(getattr(type(layer), name, None) is getattr(cls, name, None) for name in _COMPUTING)
            return same and not any(name in vars(layer) for name in _COMPUTING)
    return False


_COMPUTING = ("forward", "_conv_forward", "__call__")


def _take_plain_weight(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint of the plain layer load: its weight is the raw weight."""
    plain = f"{prefix}weight"
    if aol_of(layer) is not None and plain in state:
        state[f"{prefix}parametrizations.weight.original"] = state.pop(plain)
        state[f"{prefix}parametrizations.weight.0.groundwire_aol"] = torch.empty(0)


def bake(module: _Layer) -> _Layer:
    """Replace every AOL parametrization in ``module`` by the weight it gives, in place; outputs stay bit-equal.

    Example:
        >>> list(bake(constrain(nn.Linear(4, 4))).state_dict())
        ['weight', 'bias']
    """
    for layer in list(module.modules()):
        if aol_of(layer) is not None:
            _own_class(layer)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            _drop_hook(layer)
            for name in [name for name in layer._parameters if name != "weight"]:
                layer._parameters[name] = layer._parameters.pop(name)  # the order of a plain layer
    return module


def _own_class(layer: nn.Module) -> None:
    """A class that no copy shares: torch deletes the weight's property from the class of a layer that it bakes."""
    cls = type(layer)
    layer.__class__ = type(cls.__name__, cls.__bases__, {k: v for k, v in vars(cls).items() if k not in _OF_CLASSES})


_OF_CLASSES = ("__dict__", "__weakref__")


def _drop_hook(layer: nn.Module) -> None:
    hooks = layer._load_state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "hook", None) is _take_plain_weight]:
        del hooks[key]


def baked_copy(module: _Layer) -> _Layer:
    """A copy of ``module`` with plain weights; ``module`` stays as it is."""
    return bake(copy.deepcopy(module))
