"""Finding the layer that produces the model's scores.

The layer registered last and the layer called last are both wrong on common models (auxiliary heads, attention,
classifiers registered first). What is right: walk the autograd graph back from the outputs of one evaluation-mode
forward, and stop on every path at the first Linear, Conv or other layer with a weight matrix of its own. One layer,
reached without passing a loose parameter, is the head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundwire.batch import tensors_in
from groundwire.errors import PluginError
from groundwire.forward import call_forward
from groundwire.modules import evaluating
from groundwire.records import Fields, Head

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def candidates(module: nn.Module) -> list[str]:
    """Return the names of all layers that could be a head.

    Example:
        >>> candidates(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        ['0', '2']
    """
    return [
        name for name, child in module.named_modules() if isinstance(child, LAYERS) or (name and _is_product(child))
    ]


def _is_product(layer: nn.Module) -> bool:
    """Tell whether ``layer`` looks like a library's own linear layer: a matrix ``weight``, and no layers inside."""
    weight = layer._parameters.get("weight")
    if weight is None or next(layer.children(), None) is not None:
        return False
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm | nn.RMSNorm) or "Norm" in type(layer).__name__:
        return False
    return not isinstance(weight, nn.UninitializedParameter) and sum(size > 1 for size in weight.shape) > 1


def named_head(module: nn.Module, name: str) -> Head:
    """Return the head that the user named.

    Raises:
        PluginError: There is no such layer.
    """
    found = dict(module.named_modules()).get(name)
    if found is None or not name:
        raise PluginError(f"head={name!r} is not a layer of {type(module).__name__} -> one of {candidates(module)}")
    return Head(name, found)


def find_head(module: nn.Module, inputs: Any, batch: Any = None) -> Head:
    """Return the head of ``module``, from one forward pass of ``inputs`` that leaves no trace.

    Args:
        module: The module.
        inputs: What its forward takes, or the :class:`~groundwire.Fields` of the batch.
        batch: The batch, of which ``forward`` may take more than the inputs by their keys.

    Raises:
        PluginError: ``forward`` does not work on ``inputs``, or the outputs do not come from exactly one layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Sigmoid())
        >>> find_head(net, torch.zeros(1, 2)).name
        '2'
    """
    nodes: dict[Any, str] = {}
    with _graph_of_everything(module), ExitStack() as stack:
        for name in candidates(module):
            stack.enter_context(_marking(module.get_submodule(name), name, nodes))
        try:
            fields = inputs if isinstance(inputs, Fields) else Fields(inputs)
            usable: dict[int, Any] = {}
            fields = Fields(_outside_inference(fields.inputs, usable), _outside_inference(fields.targets, usable))
            output = call_forward(module, _outside_inference(batch, usable), fields)
        except Exception as error:
            raise _refusal(module, f"its forward(inputs) failed with {type(error).__name__}: {error}") from error
    layers, loose = _trace_back(output, nodes)
    if len(layers) == 1 and not loose:
        name = next(iter(layers))
        return Head(name, module.get_submodule(name))
    found = ", ".join(sorted(layers)) or "no Linear or Conv layer"
    raise _refusal(module, f"its outputs come from {found}" + (" and from a parameter of no layer" if loose else ""))


def _refusal(module: nn.Module, reason: str) -> PluginError:
    return PluginError(
        f"cannot tell which layer of {type(module).__name__} produces its scores: {reason} -> name it with "
        f"Plugins(head=...); candidates: {candidates(module)}"
    )


@contextmanager
def _graph_of_everything(module: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode, and gradients on for every parameter, as a frozen head must be seen too."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluating(module), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _outside_inference(value: Any, done: dict[int, Any]) -> Any:
    """Return ``value`` with tensors that autograd may save; those made in inference mode may not be.

    Args:
        value: A tensor, a container, or an object of the user's own that holds tensors. It stays as it is.
        done: What was returned for each part so far, by its id: one part stays one.
    """
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Tensor):
        done[id(value)] = value.clone() if value.is_inference() else value
    elif type(value) in (list, tuple):
        done[id(value)] = type(value)(_outside_inference(item, done) for item in value)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        done[id(value)] = type(value)(*(_outside_inference(item, done) for item in value))
    elif isinstance(value, dict) or (hasattr(value, "__dict__") and not isinstance(value, type | nn.Module)):
        _rebuild(value, done)
    return done.get(id(value), value)


def _rebuild(value: Any, done: dict[int, Any]) -> None:
    """Put a shallow copy of a dict or an object into ``done``, with the parts that had to be made anew."""
    try:
        twin = copy.copy(value)
    except Exception:
        return  # it forbids to be copied, and is given as it is
    if twin is value:
        return
    done[id(value)] = twin
    for store in (twin, getattr(twin, "__dict__", {})):
        if isinstance(store, dict):
            for key, item in list(store.items()):
                new = _outside_inference(item, done)
                if new is not item:
                    store[key] = new


@contextmanager
def _marking(layer: nn.Module, name: str, nodes: dict[Any, str]) -> Iterator[None]:
    def mark(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                nodes[tensor.grad_fn] = name

    handle = layer.register_forward_hook(mark)
    try:
        yield
    finally:
        handle.remove()


def _trace_back(output: Any, nodes: dict[Any, str]) -> tuple[set[str], bool]:
    """Return the layers first met on the way back from ``output``, and whether a path ends in a parameter before."""
    stack = [t.grad_fn for t in _outputs(output) if t.grad_fn is not None]
    seen, layers, loose = set(stack), set(), False
    while stack:
        node = stack.pop()
        if node in nodes:
            layers.add(nodes[node])
            continue
        loose = loose or hasattr(node, "variable")
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return layers, loose


def _outputs(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in what ``forward`` returned; outputs of libraries are mappings or have them in ``vars``."""
    found = list(tensors_in(dict(output) if isinstance(output, Mapping) else output))
    yield from found or tensors_in(list(vars(output).values()) if hasattr(output, "__dict__") else [])
