"""Traces of a run on the objects it touched, and the objects that a copy of a module holds on to."""

from __future__ import annotations

import gc
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch.nn.modules import module as torch_module

#: The walk over a copy does not enter these: every object leads to its class, and a class to everything.
_CLOSED = (type, types.ModuleType)


def traces(module: Any, trainer: Any) -> Counter[str]:
    """Attributes, hooks, buffers and classes of ``module``, and of ``trainer``, its strategy and its optimizers.

    Two runs of the same kind leave equal traces; subtract one from the other to see what one left behind.
    """
    found: Counter[str] = Counter()
    for name, child in module.named_modules():
        owner = f"module.{name}".rstrip(".")
        found[f"{owner} is a {type(child).__qualname__}"] += 1
        found.update(_of_object(owner, child))
        found.update(f"buffer {owner}.{key}" for key in child._buffers)
    for name, parameter in module.named_parameters():
        found[f"backward hook on module.{name}"] += len(parameter._backward_hooks or ())
    return found + _of_trainer(trainer)


def stays(value: Any) -> bool:
    """Tell whether core itself leaves ``value`` on a strategy: what adds provenance to saves after the run."""
    return type(value).__module__.startswith("groundwire.services.checkpoint.")


def _of_trainer(trainer: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for number, optimizer in enumerate(trainer.optimizers):
        found.update(_of_object(f"trainer.optimizers[{number}]", optimizer))
    found.update(_of_object("trainer", trainer))
    found.update(_of_object("trainer.strategy", trainer.strategy))
    found -= Counter(
        f"attribute trainer.strategy.{key}" for key, value in vars(trainer.strategy).items() if stays(value)
    )
    found.update(_hooks("torch", vars(torch_module)))
    return found


def _of_object(owner: str, obj: Any) -> Counter[str]:
    return Counter(f"attribute {owner}.{key}" for key in vars(obj)) + _hooks(owner, vars(obj))


def _hooks(owner: str, store: dict[str, Any]) -> Counter[str]:
    return Counter(
        {f"hook in {owner}.{k}": len(v) for k, v in store.items() if k.endswith("_hooks") and isinstance(v, dict)}
    )


def left_behind(subject: Counter[str], reference: Counter[str]) -> list[str]:
    """Return what ``subject`` has and ``reference`` has not, and the other way round, one line each."""
    return sorted(f"{line} was left" for line in subject - reference) + sorted(
        f"{line} is gone" for line in reference - subject
    )


def holds(root: Any, kinds: tuple[type, ...]) -> list[str]:
    """Names of the classes in ``kinds`` (or called Trainer) of which ``root`` holds an object, however indirectly.

    Example:
        >>> class Plugin: ...
        >>> plugin = Plugin()
        >>> holds({"owner": [plugin]}, (Plugin,))
        ['Plugin']
    """
    found: set[str] = set()
    seen: dict[int, Any] = {id(root): root}
    waiting = [root]
    while waiting:
        for value in _referents(waiting.pop()):
            if id(value) in seen or isinstance(value, _CLOSED):
                continue
            seen[id(value)] = value
            if isinstance(value, kinds) or _is_trainer(value):
                found.add(type(value).__qualname__)
            else:
                waiting.append(value)
    return sorted(found)


def _referents(value: Any) -> Iterable[Any]:
    # A function leads to the globals of its module, which nobody copies.
    return _of_function(value) if isinstance(value, types.FunctionType) else gc.get_referents(value)


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        yield from gc.get_referents(cell)
    yield from (function.__defaults__, function.__kwdefaults__, vars(function))


def _is_trainer(value: Any) -> bool:
    root = type(value).__module__.partition(".")[0]
    return type(value).__name__ == "Trainer" and root in ("lightning", "pytorch_lightning")
