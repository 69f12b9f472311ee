"""Masks that outlive a step: periodic ones, and those that keep a pruned model's zeros through fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from multiprocessing.context import get_spawning_popen
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from groundwire_cram.operators import Operator
from groundwire_cram.prunable import Skip, check_selection

#: A mask in a checkpoint: its shape, and its bits as bytes.
Packed = tuple[list[int], bytes]


def pack(mask: Tensor) -> Packed:
    r"""Return a bool mask in a form for checkpoints: one bit an entry, and no tensor.

    Example:
        >>> pack(torch.tensor([[True, False, True]]))
        ([1, 3], b'\xa0')
    """
    return list(mask.shape), np.packbits(mask.cpu().numpy()).tobytes()


def unpack(packed: Packed) -> Tensor:
    r"""Return the mask that :func:`pack` was given.

    Example:
        >>> unpack(([1, 3], b"\xa0"))
        tensor([[ True, False,  True]])
    """
    shape, data = packed
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=prod(shape))
    return torch.from_numpy(bits.astype(bool)).reshape(tuple(shape))


class Periodic:
    """An operator whose masks are taken anew at each ``interval``-th use, and kept in between.

    Args:
        operator: One that gives masks.
        interval: Uses for which a mask stays, at least 1.

    Example:
        >>> from groundwire_cram.operators import Magnitude
        >>> periodic = Periodic(Magnitude(0.5), interval=2)
        >>> for w in torch.tensor([[[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]]]):
        ...     periodic.next_use()
        ...     print(periodic.apply({"w": w})["w"].tolist())
        [[False, False, True]]
        [[False, False, True]]
        [[True, False, False]]
    """

    def __init__(self, operator: Operator, interval: int) -> None:
        self.operator, self.interval = operator, interval
        self._uses = 0
        self._known: set[str] = set()
        self._masks: dict[str, Tensor] = {}

    def next_use(self) -> None:
        """Begin another use, in which :meth:`apply` is called once for each group of tensors."""
        if self._uses % self.interval == 0:
            self._known, self._masks = set(), {}
        self._uses += 1

    def apply(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the masks of this use.

        Raises:
            ValueError: The operator gives something other than masks, which cannot be kept for other weights.
        """
        if not params.keys() <= self._known:
            masks = self.operator.apply(params)
            if any(mask.dtype != torch.bool for mask in masks.values()):
                raise ValueError(f"interval > 1 keeps masks, and {self.operator} gives residuals -> interval=1")
            self._masks.update(masks)
            self._known |= params.keys()
        return {name: mask.to(params[name].device) for name, mask in self._masks.items() if name in params}

    def __str__(self) -> str:
        return str(self.operator)

    def state_dict(self) -> dict[str, Any]:
        """Return how often it was used, and the masks as bytes."""
        masks = {name: pack(mask) for name, mask in self._masks.items()}
        return {"uses": self._uses, "masks": masks, "dense": sorted(self._known - masks.keys())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._uses = state["uses"]
        self._masks = {name: unpack(packed) for name, packed in state["masks"].items()}
        self._known = {*self._masks, *state.get("dense", ())}


#: Frozen parameters and their masks, by identity. An entry goes with its parameter, before its id can be used again.
_frozen: dict[int, tuple[ref[nn.Parameter], Tensor]] = {}
#: torch's handle of :func:`_zero_again`, which every optimizer's step calls while something is frozen.
_step_hook: list[RemovableHandle] = []


class Frozen:
    """Handle of :func:`freeze_masks`: ``remove()`` lets the zeros go, and so does leaving a ``with`` block.

    Attributes:
        masks: By parameter name: True where a weight may change.
    """

    def __init__(self, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        parameters = dict(module.named_parameters())
        self._undo = _freeze([(parameters[name], mask) for name, mask in masks.items()])
        spawned = _Spawned([(ref(parameters[name]), mask) for name, mask in masks.items()])
        kept = module.__dict__.setdefault(_SPAWNED, [])
        kept.append(spawned)
        self._undo.append(lambda: kept.remove(spawned))

    def remove(self) -> None:
        """Let the zeros change again."""
        while self._undo:
            self._undo.pop()()
        if not _frozen and _step_hook:
            _step_hook.pop().remove()

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def _freeze(frozen: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Callable[[], Any]]:
    """Freeze parameters in this process; return what undoes it."""
    undo: list[Callable[[], Any]] = []
    for parameter, mask in frozen:
        forget = partial(_frozen.pop, id(parameter), None)
        _frozen[id(parameter)] = ref(parameter, lambda _, forget=forget: forget()), mask  # type: ignore[misc]
        undo.append(forget)
        if parameter.requires_grad:
            # Gradients of zeros count neither in momentum nor in a clipped norm.
            hook = partial(_masked, mask)
            hook.__torch_unserializable__ = True  # type: ignore[attr-defined]  # spawned processes make their own
            undo.append(parameter.register_hook(hook).remove)  # type: ignore[no-untyped-call]
    if not _step_hook:
        _step_hook.append(register_optimizer_step_post_hook(_zero_again))
    return undo


#: Attribute of a module with frozen masks: what takes them into spawned processes.
_SPAWNED = "_groundwire_frozen_masks"


class _Spawned:
    """Record in a module that freezes its masks again in a process that is spawned with the module.

    Lightning's ddp_spawn pickles the module; parameters are then other objects, and without their hooks. In other
    copies and pickles nothing is frozen.
    """

    def __init__(self, frozen: Sequence[tuple[ref[nn.Parameter], Tensor]]) -> None:
        self.frozen = frozen

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as parameters with their masks for a process that is spawned, otherwise as an empty list."""
        if get_spawning_popen() is None:
            return list, ()
        alive = [(reference(), mask) for reference, mask in self.frozen]
        return _freeze, ([(parameter, mask) for parameter, mask in alive if parameter is not None],)


def freeze_masks(module: nn.Module, skip: Skip = ()) -> Frozen:
    """Keep the zeros of a pruned model through fine-tuning: after each optimizer step they are zero again.

    Works with any optimizer and loop, and with any Trainer: what is kept is what every ``torch.optim`` step changes,
    whatever momentum or noise it adds. For linear fine-tuning turn off ``requires_grad`` of the backbone beside it.

    Args:
        module: The pruned module; tensors without a zero are left alone.
        skip: Layers whose zeros may change, such as a new classifier head
            (see :func:`~groundwire_cram.prunable.selected`).

    Returns:
        A handle with ``masks`` and ``remove()``.

    Raises:
        ValueError: No selected weight is zero, so there is nothing to keep.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> with torch.no_grad():
        ...     layer.weight[0, 0] = 0
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> with freeze_masks(layer):
        ...     layer(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> layer.weight.tolist()
        [[0.0, 0.0]]
    """
    parameters = dict(module.named_parameters())
    names = check_selection(module, skip)
    masks = {name: parameters[name].detach() != 0 for name in names}
    masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    if not masks:
        raise ValueError(f"none of {names} has a zero to keep -> prune the module first: prune(module, 0.9)")
    return Frozen(module, masks)


def _masked(mask: Tensor, grad: Tensor) -> Tensor:
    return grad.masked_fill(~mask.to(grad.device), 0)


def _zero_again(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the frozen zeros of an optimizer's parameters again, after its step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in _frozen:
                with torch.no_grad():
                    parameter.masked_fill_(~_frozen[id(parameter)][1].to(parameter.device), 0)
