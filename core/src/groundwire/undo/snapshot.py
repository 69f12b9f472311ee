"""The state of a module outside its parameters, and the parameters that its own training step edits.

Buffers, metrics and the module's own Python attributes are put back after a second pass through the user's code. Files,
prints and objects outside the module are not, and cannot be.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from groundwire._lightning import LIGHTNING_MODULE_NAMES, MODULE_NAMES
from groundwire.errors import PluginError

_CONTAINERS = (list, dict, set, deque, tuple)
#: A longer container, such as a vocabulary, is only cut back to its length: copying it for every replay would be slow.
_LARGEST = 10_000
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
#: In a container that holds nothing but tensors, only the newest are watched: such lists grow with the epoch.
_WATCHED = 32
_PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size})


class Snapshot:
    """The state of a module outside its parameters; :meth:`restore` puts it back in place, aliases included.

    Saved: every buffer, every attribute that is not torch's or Lightning's own on any submodule (also on metrics,
    other modules and objects of the user's own classes), and the contents of lists, dicts, sets and arrays.

    Raises:
        PluginError: On restore, if a tensor inside a list or dict of the module was edited in place: it was not
            copied (such lists grow with the epoch), so it cannot be put back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._stores: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self._generators: list[Callable[[], Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._versions: list[tuple[str, Tensor, int]] = []
        self._seen: set[int] = set()
        self._save_value(type(module).__name__, module)

    def restore(self) -> None:
        """Put everything back."""
        for container, before in self._containers:
            _refill(container, before)
        for store, attributes in self._stores:
            _rebind(store, attributes)
        for undo in self._generators:
            undo()
        for array, content in self._arrays:
            array[...] = content
        with torch.no_grad():
            for store, key, tensor, copy in self._tensors:
                if tensor.is_inference():
                    store[key] = copy
                else:
                    tensor.copy_(copy)
        self._refuse_lost_edits()

    def _refuse_lost_edits(self) -> None:
        for owner, tensor, version in self._versions:
            if tensor._version != version:
                raise PluginError(
                    f"{owner}: a tensor inside a Python container was changed in place by the training step, which "
                    "cannot be undone after a replay -> keep it as a buffer (register_buffer) or replace it"
                )

    def _save_module(self, name: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        base = LIGHTNING_MODULE_NAMES if hasattr(type(module), "training_step") else MODULE_NAMES
        for store in (vars(module), module._buffers):
            before = dict(store)
            self._stores.append((store, before))
            for key, value in before.items():
                if type(value) not in _PLAIN and key not in base:
                    self._save_value(f"{name}.{key}", value, store, key)

    def _save_value(self, owner: str, value: Any, store: dict[str, Any] | None = None, key: str = "") -> None:
        """Descend into containers, modules and objects of the user's own classes."""
        if isinstance(value, Tensor):
            self._save_tensor(owner, value, store, key)
        elif isinstance(value, np.ndarray):
            self._arrays.append((value, value.copy()))
        elif isinstance(value, _CONTAINERS):
            self._save_container(owner, value)
        elif isinstance(value, nn.Module):
            for name, child in value.named_modules():
                self._save_module(f"{owner}.{name}" if name else owner, child)
        elif isinstance(value, _GENERATORS):
            self._generators.append(_generator_undo(value))
        elif not isinstance(value, Dataset | DataLoader) and _is_users(type(value)):  # type: ignore[arg-type]
            self._save_object(owner, value)

    def _save_object(self, owner: str, value: Any) -> None:
        """An object of a class of the user's own, such as a meter: its attributes."""
        if id(value) not in self._seen and hasattr(value, "__dict__"):
            self._seen.add(id(value))
            before = dict(vars(value))
            self._stores.append((vars(value), before))
            for key, item in before.items():
                if type(item) not in _PLAIN:
                    self._save_value(f"{owner}.{key}", item, vars(value), key)

    def _save_tensor(self, owner: str, value: Tensor, store: dict[str, Any] | None, key: str) -> None:
        if store is not None:
            self._tensors.append((store, key, value, value.detach().clone()))
        elif not value.is_inference():
            self._versions.append((owner, value, value._version))

    def _save_container(self, owner: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if len(value) > _LARGEST:
            self._containers.append((value, len(value)))
            return
        if not isinstance(value, tuple):
            self._containers.append((value, dict(value) if isinstance(value, dict) else list(value)))
        items = list(value.values() if isinstance(value, dict) else value)
        kinds = set(map(type, items)) - _PLAIN
        for item in items[-_WATCHED:] if kinds <= {Tensor} else items:
            if type(item) not in _PLAIN:
                self._save_value(owner, item)


def _generator_undo(generator: Any) -> Callable[[], Any]:
    """Return what puts a random generator of the module's own back to its state of now."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.Generator):
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    return functools.partial(generator.setstate, generator.getstate())


@functools.cache
def _is_users(cls: Hashable) -> bool:
    """Tell whether ``cls`` is the user's own code: neither the standard library's nor an installed package's.

    Their objects may stand for something outside (a file, a process), whose state must not be turned back.
    """
    assert isinstance(cls, type)
    if cls.__module__ == "builtins" or issubclass(cls, type):
        return False
    root = cls.__module__.split(".")[0]
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    return root not in sys.stdlib_module_names and root != "groundwire" and "site-packages" not in file


def _rebind(store: dict[str, Any], before: dict[str, Any]) -> None:
    if _same(store, before) and _same(store.values(), before.values()):
        return
    for key in store.keys() - before.keys():
        del store[key]
    for key, value in before.items():
        if store.get(key) is not value or key not in store:
            store[key] = value


def _refill(container: Any, before: Any) -> None:
    """Give a list, deque, set or dict its old items (or length), without touching one that still has them."""
    if isinstance(before, int):
        while len(container) > before:
            container.popitem() if isinstance(container, dict) else container.pop()
    elif isinstance(container, dict):
        if not _same(container.values(), before.values()) or not _same(container, before):
            container.clear()
            container.update(before)
    elif not _same(container, before):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(before)


def _same(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


@contextmanager
def parameters_restored(
    module: nn.Module, edited: Collection[nn.Parameter], saved: Collection[nn.Parameter]
) -> Iterator[None]:
    """Context manager that puts back the parameters that the training step itself edits, such as a momentum teacher's.

    Args:
        module: The module whose training step runs again.
        edited: Parameters that the first pass changed: the second one will too.
        saved: Parameters that somebody else restores.

    Raises:
        PluginError: Another parameter changed.
    """
    others = set(map(id, saved))
    copies = {id(p): p.detach().clone() for p in edited if id(p) not in others}
    versions = [(name, p, p._version) for name, p in module.named_parameters() if id(p) not in others]
    try:
        yield
    finally:
        changed = [(name, p) for name, p, version in versions if p._version != version]
        with torch.no_grad():
            for _, p in changed:
                if id(p) in copies:
                    p.copy_(copies[id(p)])
    lost = [name for name, p in changed if id(p) not in copies]
    if lost:
        raise PluginError(
            f"training_step changed the parameter {lost[0]!r} in place when it ran again, but not the first time, "
            "which cannot be undone -> change it in on_train_batch_end"
        )
