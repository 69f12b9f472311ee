"""The state of a module outside its parameters, and the parameters that its own training step edits.

While a module's code runs once more, the module works on copies of its buffers and of tensors that it holds as
attributes; then the originals are bound back. Nobody writes into an original, so a graph that saved it can still be
used. The module's other attributes, its registries and its metrics are put back. Files, prints and objects outside the
module are not, and cannot be.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from groundwire._lightning import LIGHTNING_MODULE_NAMES, MODULE_NAMES
from groundwire.attributes import PLAIN, Attributes, has_attributes
from groundwire.errors import PluginError
from groundwire.undo.random_states import GENERATORS, rewinding

_CONTAINERS = (list, dict, set, deque, tuple)
#: A longer container, such as a vocabulary, is only cut back to its length: copying it for every replay would be slow.
_LARGEST = 10_000
#: In a container that holds nothing but tensors, only the newest are watched: such lists grow with the epoch.
_WATCHED = 32
#: The dicts and sets in which torch keeps what is registered at a module: parameters, modules, buffers, hooks.
_REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_registries_of = operator.itemgetter(*_REGISTRIES)

Store = MutableMapping[str, Any]


class Snapshot:
    """The state of a module outside its parameters, from now until :meth:`restore`.

    Put back: every buffer and tensor attribute (the same object, with the same value and the same version); what is
    registered at each submodule, hooks included; every attribute that is not torch's or Lightning's own, on any
    submodule, on metrics, other modules and objects of the user's own classes, and on these classes themselves; and
    the contents of lists, dicts, sets and arrays, aliases included.

    Args:
        module: The module whose code runs.
        also: Objects whose code runs too: their attributes are put back.

    Raises:
        PluginError: On restore, if a tensor was edited that the module reaches by another way than as a buffer or an
            attribute. It was not copied (lists of tensors grow with the epoch), so it cannot be put back.
    """

    def __init__(self, module: nn.Module, also: Iterable[Any] = ()) -> None:
        self._stores: list[tuple[Store, dict[str, Any]]] = []
        self._registries: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []
        self._types: list[tuple[nn.Module, type]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._tensors: list[tuple[str, Store, str, Tensor]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._generators: list[Callable[[], Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._versions: list[tuple[str, Tensor, int]] = []
        self._seen: set[int] = set()
        modules = list(module.named_modules())
        self._parameters = {id(p): p for _, m in modules for p in m._parameters.values() if p is not None}
        self._save_modules(type(module).__name__, modules)
        for each in also:
            self._save_object(type(each).__name__, each)
        try:
            with torch.inference_mode(False):
                self._work_on_copies()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put everything back."""
        for container, before in self._containers:
            _refill(container, before)
        for module, cls in self._types:
            if type(module) is not cls:
                module.__class__ = cls
        if any(self._empty):
            for registry in self._empty:
                registry.clear()
        for store, attributes in (*self._registries, *self._stores):
            _rebind(store, attributes)
        for cls, attributes in self._classes:
            _rebind_class(cls, attributes)
        for undo in self._generators:
            undo()
        for array, content in self._arrays:
            array[...] = content
        with torch.no_grad():
            for tensor, value in self._values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for owner, tensor, version in self._versions:
            if tensor._version != version:
                raise PluginError(
                    f"{owner}: a tensor inside a Python container, or known to somebody else, was changed in place by "
                    "the training step, which cannot be undone after a replay -> register it at the module "
                    "(register_buffer, add_module) and reach it by its name, or replace it"
                )

    # What there is

    def _save_modules(self, owner: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
        for name, child in modules:
            self._save_module(f"{owner}.{name}" if name else owner, child)

    def _save_module(self, name: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):
            self._values += [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]
            return
        self._types.append((module, type(module)))
        self._save_class(type(module))
        base = LIGHTNING_MODULE_NAMES if hasattr(type(module), "training_step") else MODULE_NAMES
        attributes = vars(module)
        for registry in _registries_of(attributes):
            if registry:
                self._registries.append((registry, registry.copy()))
            else:
                self._empty.append(registry)
        self._save_store(name, attributes, base)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                self._save_tensor(f"{name}.{key}", buffer, module._buffers, key)
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in self._parameters:
                self._save_tensor(f"{name}.{key}", parameter)

    def _save_store(self, owner: str, store: Store, base: Collection[str] = ()) -> None:
        before = dict(store)
        self._stores.append((store, before))
        for key, value in before.items():
            if type(value) not in PLAIN and key not in base:
                self._save_value(f"{owner}.{key}", value, store, key)

    def _save_value(self, owner: str, value: Any, store: Store | None = None, key: str = "") -> None:
        """Descend into containers, modules and objects of the user's own classes."""
        if isinstance(value, Tensor):
            self._save_tensor(owner, value, store, key)
        elif isinstance(value, np.ndarray):
            self._arrays.append((value, value.copy()))
        elif isinstance(value, _CONTAINERS):
            self._save_container(owner, value)
        elif isinstance(value, nn.Module):
            self._save_modules(owner, value.named_modules())
        elif isinstance(value, GENERATORS):
            self._generators.append(rewinding(value))
        elif _is_users(type(value)) and has_attributes(value):  # type: ignore[arg-type]
            self._save_object(owner, value)

    def _save_object(self, owner: str, value: Any) -> None:
        """An object of a class of the user's own, such as a meter: its attributes, and those of its class."""
        if id(value) not in self._seen:
            self._seen.add(id(value))
            self._save_class(type(value))
            self._save_store(owner, Attributes(value))

    def _save_class(self, cls: type) -> None:
        """What a class of the user's own holds, such as a list that all its instances share."""
        if id(cls) in self._seen:
            return
        for each in cls.__mro__:
            if id(each) in self._seen:
                continue
            self._seen.add(id(each))
            if not _is_users(each):
                continue
            before = dict(vars(each))
            self._classes.append((each, before))
            for key, value in before.items():
                if type(value) not in PLAIN and not key.startswith("__"):
                    self._save_value(f"{each.__name__}.{key}", value)

    def _save_tensor(self, owner: str, value: Tensor, store: Store | None = None, key: str = "") -> None:
        """A parameter of the module is somebody else's to restore."""
        if id(value) in self._parameters:
            return
        if not value.is_inference() and not is_lazy(value):
            self._versions.append((owner, value, value._version))
        if store is not None and not isinstance(value, nn.Parameter) and not is_lazy(value):
            self._tensors.append((owner, store, key, value))

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
        kinds = set(map(type, items)) - PLAIN
        for item in items[-_WATCHED:] if kinds <= {Tensor} else items:
            if type(item) not in PLAIN:
                self._save_value(owner, item)

    # Copies to work on

    def _work_on_copies(self) -> None:
        """Bind a copy in the place of each buffer and tensor attribute, and of the same tensor in a list or dict."""
        distinct = {id(tensor): tensor for _, _, _, tensor in self._tensors}
        storages = {key: _storage(tensor) for key, tensor in distinct.items()}
        weights = set(map(_storage, self._parameters.values())) - {0} if distinct else set()
        several = {storage for storage, count in Counter(storages.values()).items() if storage and count > 1}
        copies: dict[int, Tensor] = {}
        memories: dict[int, torch.UntypedStorage] = {}
        for key, tensor in distinct.items():
            storage = storages[key]
            if storage in weights:
                # The weights by another name: in a second pass it shows them where the plugin moved them.
                self._values.append((tensor, tensor.detach().clone()))
            elif storage in several and _plain_memory(tensor):
                if storage not in memories:
                    memories[storage] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
                place = memories[storage], tensor.storage_offset(), tensor.size(), tensor.stride()
                copies[key] = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
            else:
                copies[key] = _copied(tensor)
        for _, store, name, tensor in self._tensors:
            if id(tensor) in copies:
                store[name] = copies[id(tensor)]
        for container, before in self._containers:
            if isinstance(container, dict | list | deque) and not isinstance(before, int):
                for key, item in before.items() if isinstance(before, dict) else enumerate(before):
                    if id(item) in copies:
                        container[key] = copies[id(item)]


def _storage(tensor: Tensor) -> int:
    """Return where the memory of ``tensor`` begins, 0 if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, wrapped or not made yet
        return 0


def _plain_memory(tensor: Tensor) -> bool:
    special = tensor.requires_grad or tensor.is_conj() or tensor.is_neg()
    return type(tensor) is Tensor and not special


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` that takes its place in a graph."""
    if tensor.grad_fn is not None:
        with torch.enable_grad():
            return tensor.clone()
    copy = tensor.detach().clone()
    if tensor.requires_grad:
        copy.requires_grad_()
        copy.grad = None if tensor.grad is None else tensor.grad.clone()
    return copy


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
    return root not in sys.stdlib_module_names and not root.startswith("groundwire") and "site-packages" not in file


def _rebind(store: Any, before: Any) -> None:
    """Give a store of attributes, or a registry, what it held, in the order in which it held it."""
    if isinstance(store, set):
        if store != before:
            store.clear()
            store.update(before)
    elif not _same(store.keys(), before.keys()):
        store.clear()
        store.update(before)
    elif not _same(store.values(), before.values()):
        store.update(before)


def _rebind_class(cls: type, before: dict[str, Any]) -> None:
    now = vars(cls)
    if _same(now, before) and _same(now.values(), before.values()):
        return
    for key in now.keys() - before.keys():
        delattr(cls, key)
    for key, value in before.items():
        if key not in now or now[key] is not value:
            setattr(cls, key, value)


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
