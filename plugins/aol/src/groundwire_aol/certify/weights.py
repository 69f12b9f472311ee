"""Marks of a model's weights, which tell whether they are still those for which something was proved."""

from __future__ import annotations

import weakref
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

#: Identity, dtype, number of writes, and sum of the bits of a tensor; or the value of a plain attribute.
_Mark: TypeAlias = tuple[int, torch.dtype, int, int] | str


class Weights:
    """Weak reference to a model, and marks of its parameters, buffers and numbers as they were.

    The numbers are plain attributes of its submodules, such as ``negative_slope``; those of a LightningModule itself
    may count batches, and are left out.

    A pickle of it knows nothing.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weights = Weights(layer)
        >>> weights.state()
        'unchanged'
        >>> _ = layer.weight.data.zero_()
        >>> weights.state()
        'weight changed'
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._reference = weakref.ref(module) if module is not None else None
        self._marks = _marks(module) if module is not None else {}

    @property
    def module(self) -> nn.Module | None:
        """The model, if it is known and still there."""
        return self._reference() if self._reference is not None else None

    def state(self) -> str:
        """Return "unchanged", which weight changed, or "unchecked" if the model is gone or was not known."""
        module = self.module
        if module is None:
            return "unchecked"
        now = _marks(module)
        changed = [name for name in {**self._marks, **now} if self._marks.get(name) != now.get(name)]
        return f"{changed[0]} changed" if changed else "unchanged"

    def __reduce__(self) -> Any:
        return Weights, ()

    def __deepcopy__(self, _: dict[int, Any]) -> Weights:
        return self


def _marks(module: nn.Module) -> dict[str, _Mark]:
    found: dict[str, _Mark] = {n: _mark(t) for n, t in [*module.named_parameters(), *module.named_buffers()]}
    for path, part in module.named_modules():
        if not hasattr(part, "training_step"):
            found.update({f"{path}.{k}".lstrip("."): repr(v) for k, v in vars(part).items() if _is_number(k, v)})
    return found


def _is_number(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and key != "training" and not key.startswith("_")


def _mark(tensor: Tensor) -> _Mark:
    """Return a mark of a tensor. Sums of integers do not depend on their order, and see edits through ``.data``."""
    found = tensor.detach().contiguous()
    if found.is_floating_point():
        found = found.view({8: torch.int64, 4: torch.int32, 2: torch.int16}.get(found.element_size(), torch.int8))
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.dtype, version, int(found.sum(dtype=torch.int64))
