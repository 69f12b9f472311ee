"""Undoing what a second pass through the user's code leaves behind.

A second pass must not be seen: buffers, metrics, the module's own Python attributes, logs and random states are put
back. Files, prints and objects outside the module are not, and cannot be.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundwire._lightning import (
    LIGHTNING_MODULE_NAMES,
    MODULE_NAMES,
    logging_to,
    silent_loggers,
)
from groundwire.errors import PluginError
from groundwire.seeds import preserve_rng

_CONTAINERS = (list, dict, set, deque, tuple)
_PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size})


class Snapshot:
    """The state of a module outside its parameters; :meth:`restore` puts it back in place, aliases included.

    Saved: every buffer, every attribute that is not torch's or Lightning's own on any submodule (also on metrics and
    other modules in plain lists and dicts), and the contents of those lists and dicts.

    Raises:
        PluginError: On restore, if a tensor inside a list or dict of the module was edited in place: it was not
            copied (such lists grow with the epoch), so it cannot be put back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._stores: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
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
        """Descend into containers; objects other than tensors, containers and modules are the user's affair."""
        if isinstance(value, Tensor):
            self._save_tensor(owner, value, store, key)
        elif isinstance(value, _CONTAINERS):
            self._save_container(owner, value)
        elif isinstance(value, nn.Module):
            for name, child in value.named_modules():
                self._save_module(f"{owner}.{name}" if name else owner, child)

    def _save_tensor(self, owner: str, value: Tensor, store: dict[str, Any] | None, key: str) -> None:
        if store is not None:
            self._tensors.append((store, key, value, value.detach().clone()))
        elif not value.is_inference():
            self._versions.append((owner, value, value._version))

    def _save_container(self, owner: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if not isinstance(value, tuple):
            self._containers.append((value, dict(value) if isinstance(value, dict) else list(value)))
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) not in _PLAIN:
                self._save_value(owner, item)


def _rebind(store: dict[str, Any], before: dict[str, Any]) -> None:
    if _same(store, before) and _same(store.values(), before.values()):
        return
    for key in store.keys() - before.keys():
        del store[key]
    for key, value in before.items():
        if store.get(key) is not value or key not in store:
            store[key] = value


def _refill(container: Any, before: Any) -> None:
    """Give a list, deque, set or dict its old items, without touching one that still has them."""
    if isinstance(container, dict):
        if not _same(container.values(), before.values()) or not _same(container, before):
            container.clear()
            container.update(before)
    elif not _same(container, before):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(before)


def _same(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


class Bystanders:
    """Parameters that the training step itself edits, such as a momentum teacher's.

    Saving every parameter for every replay would be slow, so the first replay saves all and learns which ones change;
    later ones save those.
    """

    def __init__(self) -> None:
        self._edited: set[str] | None = None

    @contextmanager
    def kept(self, module: nn.Module, saved: Collection[nn.Parameter]) -> Iterator[None]:
        """Put back what changes while open, except the parameters in ``saved``, which somebody else restores.

        Raises:
            PluginError: A parameter changed for the first time after the first replay.
        """
        others = set(map(id, saved))
        watched = {name: p for name, p in module.named_parameters() if id(p) not in others}
        copies = {n: p.detach().clone() for n, p in watched.items() if self._edited is None or n in self._edited}
        versions = {name: p._version for name, p in watched.items()}
        try:
            yield
        finally:
            changed = {name for name, p in watched.items() if p._version != versions[name]}
            with torch.no_grad():
                for name in changed & copies.keys():
                    watched[name].copy_(copies[name])
        self._edited = changed if self._edited is None else self._edited
        if changed - self._edited:
            raise PluginError(
                f"training_step changed the parameter {min(changed - self._edited)!r} in place, which it did not do in "
                "the first replay and which cannot be undone -> change it in on_train_batch_end"
            )


@contextmanager
def unseen(module: nn.Module, trainer: Any = None, log: Callable[..., None] | None = None) -> Iterator[None]:
    """Run a module's code once more without leaving a trace.

    Put back on exit, whatever happens: all buffers, the module's own attributes and metrics, the global random
    states, and the Trainer's loggers. Not undone: parameters, gradients, files, prints, objects outside the module.

    Args:
        module: The module whose code runs.
        trainer: Its Trainer, if it has one; its loggers are dummies meanwhile.
        log: Receives the ``self.log(name, value, ...)`` calls; they are dropped when it is left out.
    """
    with ExitStack() as stack:
        stack.callback(Snapshot(module).restore)
        stack.enter_context(preserve_rng())
        if trainer is not None:
            stack.enter_context(silent_loggers(trainer))
        stack.enter_context(logging_to(module, log or _drop))
        yield


def _drop(*args: Any, **kwargs: Any) -> None:
    """Take a ``self.log`` call and do nothing."""
