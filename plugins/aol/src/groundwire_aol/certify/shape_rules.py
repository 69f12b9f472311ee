"""Shape rules: for which shapes of its result a Lipschitz rule is valid. Each raises for others.

A rule that is a constant of each entry says nothing about an operation that also copies entries, as one that broadcasts
against a larger constant does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from groundwire_aol.certify.call import Call, floats_in


def same(call: Call, value: Any) -> None:
    """One entry for each entry of the input: the shapes are equal."""
    if not isinstance(value, Tensor) or value.shape != call.x.shape:
        _refuse(call, value, "copies or drops entries", "expand to the full shape first, with expand or repeat")


def fewer(call: Call, value: Any) -> None:
    """Entries of the input, or one result of each group of them: not more than there were."""
    if any(t.numel() > call.x.numel() for t in floats_in(value)):
        _refuse(call, value, "copies entries", "")


def fewer_in_all(call: Call, value: Any) -> None:
    """One of several tensors."""
    if not isinstance(value, Tensor) or all(value is not part for part in call.x):
        _refuse(call, value, "is none of several tensors", "")


def broadcast_of_all(call: Call, value: Any) -> None:
    """The common shape of three operands; the Lipschitz rule counts how often each is repeated."""
    shapes = [a.shape for a in call.args if isinstance(a, Tensor)]
    if not isinstance(value, Tensor) or value.shape != torch.broadcast_shapes(*shapes):  # type: ignore[no-untyped-call]
        _refuse(call, value, "gives another shape than its operands have together", "")


def broadcast(call: Call, value: Any) -> None:
    """The operands' common shape; the Lipschitz rule counts how often each is repeated."""
    shapes = [a.shape for a in call.args[:2] if isinstance(a, Tensor)]
    if not isinstance(value, Tensor) or value.shape != torch.broadcast_shapes(*shapes):  # type: ignore[no-untyped-call]
        _refuse(call, value, "gives another shape than its operands have together", "")


def extreme(call: Call, value: Any) -> None:
    """One entry of each group, or of two operands."""
    two = isinstance(call.argument(1, "other"), Tensor)
    (broadcast if two else fewer)(call, value)


def equal(call: Call, value: Any) -> None:
    """All operands and the result have one shape."""
    shapes = {tuple(a.shape) for a in call.args} | {tuple(value.shape)}
    if len(shapes) > 1:
        raise call.unknown(f"it combines shapes {sorted(shapes)}", "give it tensors of one shape")


def concatenated(call: Call, value: Any) -> None:
    """All entries of all branches, each once."""
    parts = call.x
    if not isinstance(value, Tensor) or value.numel() != sum(part.numel() for part in parts):
        _refuse(call, value, "is no concatenation of its branches", "")


def pooled(call: Call, value: Any) -> None:
    """Samples and channels stay."""
    if not isinstance(value, Tensor) or value.shape[:2] != call.x.shape[:2] or value.dim() != call.x.dim():
        _refuse(call, value, "moves samples or channels", "give it inputs of shape (B, C, ...)")


def multiplied(call: Call, value: Any) -> None:
    """All dimensions but the last stay."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:-1] != call.x.shape[:-1]:
        _refuse(call, value, "moves dimensions", "multiply by one matrix")


def convolved(call: Call, value: Any) -> None:
    """Samples stay, and the input has a dimension for them."""
    weight = call.layer.weight if call.layer is not None else call.argument(1, "weight")
    if call.x.dim() != weight.dim() or value.dim() != weight.dim() or value.shape[0] != call.x.shape[0]:
        _refuse(call, value, "takes samples for channels", "give it inputs of shape (B, C, ...)")


def measured(call: Call, value: Any) -> None:
    """Any: the Lipschitz rule ran the call itself on these shapes."""


def repetitions(call: Call, operands: int = 2) -> list[float]:
    """Return the bounds of the operands, each times the root of how often broadcasting repeats its entries."""
    if len(call.args) < operands:
        raise call.unknown(
            f"{call.name} has fewer than {operands} operands, or takes them by name", "give all in order"
        )
    tensors = [v for v in call.args[:operands] if isinstance(v, Tensor)]
    total = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    found = []
    for node, value in zip(call.nodes[:operands], call.args[:operands], strict=True):
        bound = call.bounds.get(node, 0.0) if isinstance(node, fx.Node) else 0.0
        if bound and (value.dim() != len(total) or value.shape[0] != total[0] or value.shape[0] != 2):
            raise call.unknown(f"broadcasting {tuple(value.shape)} to {tuple(total)} moves the batch dimension")
        found.append(bound * math.sqrt(math.prod(total) / value.numel()) if bound else 0.0)
    return found


def _refuse(call: Call, value: Any, what: str, hint: str) -> None:
    shapes = [tuple(t.shape) for t in floats_in(value)]
    result = shapes[0] if len(shapes) == 1 else shapes
    given = tuple(call.x.shape) if isinstance(call.x, Tensor) else [tuple(t.shape) for t in floats_in(call.x)]
    raise call.unknown(f"{call.name} {what}: {given} became {result}", hint)
