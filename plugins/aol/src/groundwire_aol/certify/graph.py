"""Tracing: the graph of what a model computes, with layers of known behaviour as leaves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from groundwire_aol.errors import UnknownLipschitzError

#: Modules of torch that only hold others.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is one step of the graph: torch's own and this package's are, the user's are entered.

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


class _TracerOfBuffers(_Tracer):
    proxy_buffer_attributes = True


def trace(module: nn.Module) -> fx.Graph:
    """Return the graph of ``module.forward``.

    Raises:
        UnknownLipschitzError: It depends on values or on state, or cannot be traced for another reason.
    """
    try:
        try:
            first, second = _Tracer().trace(module), _Tracer().trace(module)
        except TypeError:
            # Methods of a buffer that take sizes of the input need it to be traced as well.
            first, second = _TracerOfBuffers().trace(module), _TracerOfBuffers().trace(module)
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
    """Tell whether two traces have the same steps. Constant tensors have other names each time: their values count."""
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


def tensors_of(value: Any) -> list[Tensor]:
    """Return all tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [t for item in value for t in tensors_of(item)]
        if isinstance(value, Sequence) and not isinstance(value, str)
        else []
    )
