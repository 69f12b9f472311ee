"""Sums and concatenations of branches inside a block's own forward, rewritten so that they stay 1-Lipschitz."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from groundwire_aol.errors import UnknownLipschitzError
from groundwire_aol.layers.residual import ConvexSum, ScaledConcat

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_TEXT = {
    "sum": "sum of two branches -> learned convex combination",
    "cat": "concatenation -> divided by the root of its branches",
}


def sums_and_concatenations(graph: fx.Graph, skip: Callable[[str], bool]) -> dict[str, str]:
    """Return the paths of the blocks whose own forward adds or concatenates branches, with what happens there."""
    found: dict[str, dict[str, None]] = {}
    depends = _depending(graph)
    for node in graph.nodes:
        kind = _kind(node, depends)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        owner = stack[-1][0] if stack else ""
        if kind and not skip(owner):
            found.setdefault(owner, {})[_TEXT[kind]] = None
    return {path: ", ".join(texts) for path, texts in found.items()}


def rewrite(block: nn.Module, path: str) -> fx.GraphModule:
    """Return ``block`` as a module with :class:`ConvexSum` for sums and :class:`ScaledConcat` for concatenations.

    Raises:
        UnknownLipschitzError: Its forward is not the same sequence of steps in training and evaluation.
    """
    graph = _graph(block, path)
    depends = _depending(graph)
    added: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        kind = _kind(node, depends)
        if not kind:
            continue
        name = f"{kind}_{len(added)}"
        added[name] = ConvexSum() if kind == "sum" else ScaledConcat(_dim(node))
        with graph.inserting_before(node):
            # A concatenation takes its branches as one argument.
            new = graph.call_module(name, tuple(node.args[:2]) if kind == "sum" else (node.args[0],))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    root = dict(block.named_modules())
    for name, layer in added.items():
        parameter = next(block.parameters(), None)
        if parameter is not None:
            layer.to(parameter.device, parameter.dtype)
        root[name] = layer
        block.add_module(name, layer)
    rewritten = fx.GraphModule(block, graph, type(block).__name__)
    for name in added:
        delattr(block, name)
    _keep_unused(block, rewritten)
    return rewritten.train(block.training)


def _graph(block: nn.Module, path: str) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    mode, graphs = block.training, []
    try:
        for training in (True, False):
            block.training = training
            graphs.append(Tracer().trace(block))
    except Exception as error:
        raise UnknownLipschitzError(
            path, f"its forward cannot be traced ({error})", "add branches in a module of their own"
        ) from error
    finally:
        block.training = mode
    if len({str([(n.op, n.target, n.args, n.kwargs) for n in g.nodes]) for g in graphs}) > 1:
        raise UnknownLipschitzError(
            path, "its forward differs between training and evaluation", "use nn.Dropout, not F.dropout"
        )
    return graphs[0]


def _keep_unused(block: nn.Module, rewritten: nn.Module) -> None:
    """A GraphModule copies what its graph uses; checkpoints have the rest too."""
    for name, child in block.named_children():
        if name not in rewritten._modules:
            rewritten.add_module(name, child)
    for name, parameter in block.named_parameters(recurse=False):
        if name not in rewritten._parameters:
            rewritten.register_parameter(name, parameter)
    for name, buffer in block.named_buffers(recurse=False):
        if name not in rewritten._buffers:
            rewritten.register_buffer(name, buffer)


def _depending(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _kind(node: fx.Node, depends: set[fx.Node]) -> str:
    inputs = node.args[:2]
    if node.target in _SUMS and node.op in ("call_function", "call_method") and len(inputs) == 2:
        both = all(isinstance(a, fx.Node) and a in depends for a in inputs)
        return "sum" if both and not node.kwargs and not any(_is_shape(a) for a in inputs) else ""
    if node.target in _CONCATENATIONS and node.args and isinstance(node.args[0], list | tuple):
        branches = [a for a in node.args[0] if isinstance(a, fx.Node) and a in depends]
        return "cat" if len(branches) > 1 and isinstance(_dim(node), int) else ""
    return ""


def _is_shape(node: Any) -> bool:
    return (
        node.target in ("size", "dim", "numel")
        or node.target is getattr
        or (node.target is operator.getitem and _is_shape(node.args[0]))
    )


def _dim(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
