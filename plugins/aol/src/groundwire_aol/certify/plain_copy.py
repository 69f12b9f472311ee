"""A copy of a model as it runs in evaluation, with plain weights, and refusals of what such a copy would not show."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize

from groundwire import PluginError
from groundwire.modules import shift_hooks, without_shifts
from groundwire_aol.certify.operations import is_original
from groundwire_aol.errors import UnknownLipschitzError, UnsoundError
from groundwire_aol.layers.parametrization import bake


def rows_of(example: Any) -> Tensor:
    """Return the first sample of the example input, and zero.

    Raises:
        UnsoundError: It is no floating-point tensor with a batch dimension.
    """
    if not isinstance(example, Tensor) or example.dim() < 1 or len(example) == 0:
        raise UnsoundError(f"example_input must be a batch of inputs, got {type(example).__name__} -> pass x[:1]")
    if not example.is_floating_point():
        raise UnsoundError(
            f"the input is {example.dtype}: distances between integers are no certificate -> convert images to float "
            "in [0, 1], and certify embeddings instead of token numbers"
        )
    first = example[:1].detach().clone()
    return torch.cat([first, torch.zeros_like(first)])


def evaluation_copy(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, with its parametrizations.

    Raises:
        UnsoundError: Weights are not finite, or of a precision for which no bound is proved.
        UnknownLipschitzError: Something in ``module``, or in torch, could change what its layers compute.
    """
    refuse_weights(module)
    refuse_patches(module)
    live = copy.deepcopy(module).eval()
    without_shifts(live)  # They add a vector that no input moves, so they change no distance.
    refuse_hooks(live)
    for path, part in live.named_modules():
        if part.training:
            raise UnknownLipschitzError(
                path,
                f"{type(part).__name__} stays in training mode in evaluation, as its train() or eval() was replaced",
                "remove the replacement: statistics of a batch have no certificate",
            )
    return live


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode with every parametrization baked, ready to trace.

    Raises:
        UnsoundError: Weights are not finite, or of a precision for which no bound is proved.
        UnknownLipschitzError: Something in ``module``, or in torch, could change what its layers compute.
    """
    return remove_parametrizations(evaluation_copy(module))


def remove_parametrizations(twin: nn.Module) -> nn.Module:
    """Bake every parametrization in a copy, in place.

    Raises:
        UnsoundError: One gives weights that are not finite.
    """
    bake(twin)
    for layer in list(twin.modules()):
        if parametrize.is_parametrized(layer):
            cls = type(layer)
            layer.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
            for name in list(layer.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    refuse_weights(twin)  # A parametrization may make NaN from finite numbers, as weight_norm does from a zero row.
    return twin


def refuse_weights(module: nn.Module) -> None:
    """Raise for weights and buffers that are not finite, or of less than 32 bits."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise UnsoundError(f"{name} has no values yet -> run one batch through the model first")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise UnsoundError(
                f"{name} is {tensor.dtype}: rounding a weight of norm 1 to bfloat16 gave norm 1.00257, to float16 "
                "1.00031, and activations are rounded too -> certify module.float()"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UnsoundError(f"{name} is not finite -> load a checkpoint from before the training diverged")
        if tensor.is_complex() or tensor.is_quantized:
            raise UnsoundError(f"{name} is {tensor.dtype}, for which nothing is proved -> certify the float32 model")


def refuse_hooks(module: nn.Module) -> None:
    """Raise for hooks and instance methods, which may change what a layer computes. groundwire's own do not."""
    for path, layer in module.named_modules():
        if hasattr(layer, "_orig_mod"):
            raise UnknownLipschitzError(path, "a compiled module hides its graph", "pass module._orig_mod")
        foreign = foreign_hooks(layer)
        if foreign:
            raise UnknownLipschitzError(
                path,
                f"a forward hook ({_name(foreign[0])}) may change what it computes",
                "remove it, such as by torch.nn.utils.remove_spectral_norm, or use torch.nn.utils.parametrizations",
            )
        own = vars(layer).get("forward")
        # Lightning leaves the class's own method on the instance.
        if own is not None and getattr(own, "__func__", None) is not type(layer).forward:
            raise UnknownLipschitzError(path, "forward was replaced on the instance", "give the class this forward")


def refuse_patches(module: nn.Module) -> None:
    """Raise for hooks of all modules, and for functions and layers of torch that were replaced in this process."""
    name = type(module).__name__
    hooks = [*module_hooks._global_forward_hooks.values(), *module_hooks._global_forward_pre_hooks.values()]
    if hooks:
        raise UnknownLipschitzError(
            name, f"a forward hook of all modules is registered ({_name(hooks[0])})", "remove it before certifying"
        )
    for path, layer in module.named_modules():
        for cls in type(layer).__mro__:
            if cls.__module__.split(".")[0] in ("torch", "groundwire_aol"):
                for method in map(vars(cls).get, _COMPUTING):
                    if not is_original(method):
                        raise UnknownLipschitzError(
                            path, f"{cls.__name__}.{_name(method)} was replaced", "restart without that patch"
                        )
    for key, function in vars(nn.functional).items():
        if not is_original(function):
            raise UnknownLipschitzError(name, f"torch.nn.functional.{key} was replaced", "restart without that patch")


_COMPUTING = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl")


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def foreign_hooks(layer: nn.Module) -> list[Any]:
    """Return the hooks of ``layer`` that may move its output with its input: neither groundwire's nor shifts."""
    shifts = shift_hooks(layer)
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    homes = [str(getattr(hook, "__module__", None) or type(hook).__module__) for hook in hooks]
    found = zip(hooks, homes, strict=True)
    return [hook for hook, home in found if not (home.startswith("groundwire.") or hook in shifts)]


def is_shifted(module: nn.Module, scores: Tensor) -> bool:
    """Tell whether hooks in ``module`` shift its ``scores`` now, by an addition whose rounding no bound covers."""
    shifts = [(layer, hook) for layer in module.modules() for hook in shift_hooks(layer)]
    try:
        return any(not torch.equal(hook(layer, (), torch.zeros_like(scores)), 0 * scores) for layer, hook in shifts)
    except (PluginError, RuntimeError, ValueError):
        return True  # The hooked layer gives another shape than the scores have.
