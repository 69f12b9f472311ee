"""One call in a traced graph, as the rules see it: the operation, its arguments and the bounds of what it reads."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from groundwire_aol.errors import UnknownLipschitzError

if TYPE_CHECKING:
    from groundwire_aol.certify.linear_norms import Rescale


@dataclass(frozen=True)
class Proof:
    """Bound from the model's input to the result of a call, and how its last factor was proved."""

    lipschitz: float
    how: str


@dataclass(frozen=True)
class Call:
    """One node of the graph with the values of its arguments, and the bounds of those that depend on the input.

    Attributes:
        node: The node.
        module: The module that was traced.
        args: Values of the arguments.
        kwargs: Values of the named arguments.
        bounds: Bound of each argument that depends on the model's input.
        rescales: By path, how the weight of each AOL layer was made.
        layer: The layer that is called; None for a function or method.
    """

    node: fx.Node
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    bounds: Mapping[fx.Node, float]
    rescales: Mapping[str, Rescale]
    layer: Any = None

    @property
    def name(self) -> str:
        """Name of the function, method, attribute or class of the layer."""
        if self.layer is not None:
            return type(self.layer).__name__
        name = function_name(self.node.target)
        return str(self.args[1]) if name == "getattr" and len(self.args) > 1 else name

    @property
    def path(self) -> str:
        """Path of the layer, or of the module in whose forward the operation is, and its name."""
        if self.node.op == "call_module":
            return str(self.node.target)
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        owner = stack[-1][0] if stack else ""
        return f"{owner}.{self.node.name}" if owner else self.node.name

    @property
    def nodes(self) -> tuple[Any, ...]:
        """The arguments as they stand in the graph."""
        return self.node.args

    @property
    def named_nodes(self) -> Mapping[str, Any]:
        """The named arguments as they stand in the graph."""
        return self.node.kwargs

    @property
    def x(self) -> Any:
        """Value of the first argument, however it was passed."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def sole(self) -> float | None:
        """Bound of the first argument, if nothing else depends on the input."""
        others = (*self.nodes[1:], *self.named_nodes.values())
        if not self.nodes or self.nodes[0] not in self.bounds or any(map(self.depends, others)):
            return None
        return self.bounds[self.nodes[0]]

    @property
    def only(self) -> float:
        """Bound of the first argument.

        Raises:
            UnknownLipschitzError: Something else depends on the input too.
        """
        if self.sole is None:
            raise self.unknown(f"{self.name} whose other arguments depend on the input, or by name, has no rule")
        return self.sole

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return the value of an argument, however it was passed."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def depends(self, argument: Any) -> bool:
        """Tell whether an argument, as it stands in the graph, depends on the model's input."""
        found: list[bool] = []
        fx.node.map_arg(argument, lambda n: found.append(n in self.bounds))
        return any(found)

    def unknown(self, why: str, hint: str = "") -> UnknownLipschitzError:
        """Return the refusal of this call."""
        return UnknownLipschitzError(self.path, why, hint)

    def with_first(self, value: Any) -> Call:
        """Return the same call of another first argument."""
        return replace(self, args=(value, *self.args[1:]))

    def run(self) -> Any:
        """Return what the call computes."""
        if self.node.op == "get_attr":
            return operator.attrgetter(str(self.node.target))(self.module)
        if self.layer is not None:
            return self.layer(*self.args, **self.kwargs)
        if self.node.op == "call_method":
            return getattr(self.args[0], str(self.node.target))(*self.args[1:], **self.kwargs)
        assert callable(self.node.target)
        return self.node.target(*self.args, **self.kwargs)


def function_name(target: Any) -> str:
    """Return the name by which a traced function or method stands in the table.

    Example:
        >>> function_name(nn.functional.relu), function_name(operator.add), function_name("view")
        ('relu', 'add', 'view')
    """
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def floats_in(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a result."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for item in value for t in floats_in(item)] if isinstance(value, list | tuple) else []


def sizes_per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """Return a number for each axis, however it was given.

    Example:
        >>> sizes_per_axis(3, 2), sizes_per_axis((3, 1), 2)
        ((3, 3), (3, 1))
    """
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
