"""The graph of what a model computes in evaluation, with layers of known behaviour as leaves."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from groundwire.modules import without_shifts
from groundwire_aol.constraint import bake
from groundwire_aol.errors import UnknownLipschitzError, UnsoundError

#: Modules of torch that only hold others.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one step of the graph: torch's own and this package's are, the user's are entered.

    Example:
        >>> is_leaf(nn.ReLU()), is_leaf(nn.Sequential())
        (True, False)
    """
    home = type(module).__module__.split(".")[0]
    return home == "groundwire_aol" or (home == "torch" and not isinstance(module, CONTAINERS))


class _Traced(fx.Proxy):
    """Torch's proxy takes ``x += y`` for ``x = x + y``, of which other names and views of x would know nothing."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Traced, f"__{_function.__name__}__", _in_place(_function))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Traced(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of ``module.forward``.

    Raises:
        UnknownLipschitzError: It depends on values or on state, or cannot be traced for another reason.
    """
    try:
        first, second = _Tracer().trace(module), _Tracer().trace(module)
    except Exception as error:
        raise UnknownLipschitzError(
            type(module).__name__,
            f"its forward cannot be traced ({type(error).__name__}: {_first_line(error)})",
            "make forward(x) a fixed sequence of layers and tensor operations, without branches on values or shapes",
        ) from error
    if not _equal(module, first, second):
        raise UnknownLipschitzError(
            type(module).__name__, "its forward does something else on every call", "remove counters and random numbers"
        )
    return first


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _equal(module: nn.Module, one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two traces have the same steps. Constant tensors have other names each time: their values count."""
    return _steps(module, one) == _steps(module, other)


def _steps(module: nn.Module, graph: fx.Graph) -> list[str]:
    number = {node: i for i, node in enumerate(graph.nodes)}
    steps = []
    for node in graph.nodes:
        target = node.target
        if node.op == "get_attr" and str(target).startswith("_tensor_constant"):
            target = getattr(module, str(target)).tolist()
        inputs = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number.get(n)}")
        steps.append(f"{node.op} {target} {inputs}")
    return steps


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode with every parametrization baked, ready to trace.

    Raises:
        UnsoundError: Weights are not finite, or of a precision for which no bound is proved.
        UnknownLipschitzError: Something in ``module`` could change what its layers compute.
    """
    refuse_weights(module)
    twin = copy.deepcopy(module).eval()
    without_shifts(twin)  # A run's correction of the scores: a constant, which moves no distance.
    bake(twin)
    for layer in list(twin.modules()):
        if parametrize.is_parametrized(layer):
            cls = type(layer)
            layer.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
            for name in list(layer.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    refuse_weights(twin)  # A parametrization may make NaN from finite numbers, as weight_norm does from a zero row.
    refuse_hooks(twin)
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
    """Raise for hooks and instance methods, which may change what a layer computes. groundwire's own add constants."""
    for path, layer in module.named_modules():
        if hasattr(layer, "_orig_mod"):
            raise UnknownLipschitzError(path, "a compiled module hides its graph", "pass module._orig_mod")
        hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
        foreign = [hook for hook in hooks if not _home(hook).startswith("groundwire.")]
        if foreign:
            raise UnknownLipschitzError(
                path,
                f"a forward hook ({getattr(foreign[0], '__qualname__', type(foreign[0]).__name__)}) may change what it "
                "computes",
                "remove it, such as by torch.nn.utils.remove_spectral_norm, or use torch.nn.utils.parametrizations",
            )
        own = vars(layer).get("forward")
        # Lightning leaves the class's own method on the instance.
        if own is not None and getattr(own, "__func__", None) is not type(layer).forward:
            raise UnknownLipschitzError(path, "forward was replaced on the instance", "give the class this forward")


def _home(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def rows_of(example: Any) -> Tensor:
    """The first sample of the example input, and zero.

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


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [t for item in value for t in tensors_of(item)]
        if isinstance(value, Sequence) and not isinstance(value, str)
        else []
    )


def refuse_other_results(module: nn.Module, graph: fx.Graph, example: Tensor) -> None:
    """The graph must compute what the model computes, and each sample by itself."""
    # At an example of zeros alone, models would be alike that are not.
    noise = torch.rand(example.shape, dtype=example.dtype, generator=torch.Generator().manual_seed(0))
    probe, traced = example + noise, fx.GraphModule(module, graph)
    name = type(module).__name__
    try:
        ones, others = ([tensors_of(f(x.clone())) for x in (example, probe)] for f in (module, traced))
        alone = tensors_of(module(probe[1:].clone()))
    except Exception as error:
        raise UnknownLipschitzError(
            name, f"its forward fails outside the trace ({error})", "make it take any batch"
        ) from error
    if not all(map(_close, ones, others)):
        raise UnknownLipschitzError(
            name, "its forward does not compute what was traced", "remove state and random numbers"
        )
    if not _close([t[1:] for t in ones[1]], alone):
        raise UnknownLipschitzError(
            name, "the result of a sample depends on its batch", "use no statistics of the batch"
        )


def _close(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Equal up to rounding, which is relative to the largest entry."""
    return len(ones) == len(others) and all(
        a.shape == b.shape and bool((a - b).abs().amax() <= 1e-4 * a.abs().amax())
        for a, b in zip(ones, others, strict=True)
    )
