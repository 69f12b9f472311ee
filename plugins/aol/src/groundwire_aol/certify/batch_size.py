"""Numbers that depend on the size of the batch: they may shape a result, but not change its values."""

from __future__ import annotations

from typing import Any

from torch import fx

from groundwire_aol.certify import shape_rules
from groundwire_aol.certify.call import Call
from groundwire_aol.certify.operations import CONSTANTS_LIKE, Operation

#: Take sizes as arguments.
_SHAPING = frozenset(("view", "reshape", "expand", "unflatten", "repeat", "gather", "take_along_dim"))
#: Make tensors of a size, whose values do not depend on it.
_CREATING = frozenset(("zeros", "ones", *CONSTANTS_LIKE, *_SHAPING))
#: Facts of a tensor that hold the size of the batch.
_SIZES = frozenset(("shape", "size", "numel", "nelement", "len"))


class BatchSize:
    """Nodes of a graph whose value depends on the size of the batch, in ``numbers``, or only whose shape does."""

    def __init__(self) -> None:
        self.numbers: set[fx.Node] = set()
        self.shapes: set[fx.Node] = set()

    def follow(self, call: Call, operation: Operation | None) -> None:
        """Add a call.

        Raises:
            UnknownLipschitzError: It computes values of activations from the size of the batch.
        """
        node = call.node
        numbers = [n for n in node.all_input_nodes if n in self.numbers]
        shapes = [n for n in node.all_input_nodes if n in self.shapes]
        if call.bounds and call.name in _SIZES:
            if call.name != "size" or not _is_other_axis(call.argument(1, "dim"), call.x.dim()):
                self.numbers.add(node)
        elif call.bounds and call.name in CONSTANTS_LIKE:
            self.shapes.add(node)
        elif call.bounds:
            fits = operation is not None and operation.shape in (shape_rules.broadcast, shape_rules.concatenated)
            if (numbers and call.name not in _SHAPING) or (shapes and not fits and call.name not in _SHAPING):
                raise call.unknown(
                    "it computes with a number that depends on the size of the batch", "use sizes of one sample only"
                )
        elif call.name == "getitem" and numbers:
            if not _is_other_axis(call.args[1], len(call.x)):
                self.numbers.add(node)
        elif numbers:
            (self.shapes if call.name in _CREATING else self.numbers).add(node)
        elif shapes:
            kept = operation is not None and operation.shape in (shape_rules.same, shape_rules.broadcast)
            (self.shapes if kept or call.name in _SHAPING else self.numbers).add(node)


def _is_other_axis(index: Any, axes: int) -> bool:
    """Tell whether an index into a shape leaves the batch out."""
    return 0 not in range(axes)[index] if isinstance(index, slice) else isinstance(index, int) and index % axes != 0
