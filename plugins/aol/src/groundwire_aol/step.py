"""One node of a traced graph, as the rules see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from groundwire_aol import constants
from groundwire_aol.errors import UnknownLipschitzError


@dataclass(frozen=True)
class Proof:
    """Bound from the model's input to a step's output, and how its last factor was proved."""

    lipschitz: float
    how: str


@dataclass(frozen=True)
class Step:
    """One node of the graph with the values of its arguments, and the bounds of those that depend on the input."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nodes: tuple[Any, ...]
    named_nodes: Mapping[str, Any]
    bounds: Mapping[fx.Node, float]
    values: Mapping[fx.Node, Any]

    @property
    def is_layer(self) -> bool:
        """Whether it is a whole layer rather than a function or method."""
        return bool(self.node.op == "call_module")

    @property
    def path(self) -> str:
        """The layer, or the layer in whose forward the operation is and its name."""
        if self.node.op == "call_module":
            return str(self.node.target)
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        owner = stack[-1][0] if stack else ""
        return f"{owner}.{self.node.name}" if owner else self.node.name

    @property
    def operation(self) -> str:
        """What it is called."""
        return constants.name_of(self.node.target) if self.node.op != "call_module" else "layer"

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The value of an argument, however it was passed."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def depends(self, argument: Any) -> bool:
        """Whether an argument, as it stands in the graph, depends on the model's input."""
        found: list[bool] = []
        fx.node.map_arg(argument, lambda n: found.append(n in self.bounds))
        return any(found)

    @property
    def sole(self) -> float | None:
        """Bound of the first argument, if nothing else depends on the input."""
        rest = (*self.nodes[1:], *self.named_nodes.values())
        first = self.nodes[0] if self.nodes else None
        alone = isinstance(first, fx.Node) and first in self.bounds and not any(map(self.depends, rest))
        return self.bounds[first] if alone and isinstance(first, fx.Node) else None

    def unknown(self, why: str, hint: str = "") -> UnknownLipschitzError:
        """The refusal of this step."""
        return UnknownLipschitzError(self.path, why, hint)
