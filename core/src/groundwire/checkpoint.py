"""What a checkpoint remembers of the plugins, and how models come back from it and leave groundwire.

Every save goes through ``trainer.strategy.checkpoint_io``, a documented extension point, also ``weights_only`` saves
and saves after ``fit`` returned. Only plain types are added, so ``torch.load(weights_only=True)`` keeps working.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import nn
from torch.nn.utils import parametrize

from groundwire import specs
from groundwire._lightning import before_restoring
from groundwire.discovery import Installed, installed, load_plugin
from groundwire.errors import PluginError
from groundwire.hooks import Hooks, implementations
from groundwire.modules import SHIFT, without_shifts
from groundwire.order import name_of
from groundwire.transform import plugins_of, remember
from groundwire.version import __version__

if TYPE_CHECKING:
    from groundwire.host import Host

#: The key in a checkpoint.
KEY = "groundwire"
#: A persistent empty buffer with this prefix in a parametrization names the plugin that the weights need.
BUFFER_PREFIX = "groundwire_"
_LIGHTNING_KEY = "pytorch-lightning_version"
_Module = TypeVar("_Module", bound=nn.Module)


class ProvenanceIO(CheckpointIO):
    """Adds provenance to each Lightning checkpoint that passes, and names missing plugins when one comes back.

    It stays on the Trainer after the run, so that a later ``trainer.save_checkpoint`` is complete too.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.facts: Callable[[], dict[str, Any]] = dict
        self.present: frozenset[str] = frozenset()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save with provenance. Launchers save bare state dicts through the same object: those stay as they are."""
        if _LIGHTNING_KEY in checkpoint:
            checkpoint = {**checkpoint, KEY: self.facts()}
        options = {} if storage_options is None else {"storage_options": storage_options}
        self.inner.save_checkpoint(checkpoint, path, **options)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Load, and say which plugins the checkpoint needs that this Trainer lacks."""
        options = {} if map_location is None else {"map_location": map_location}
        checkpoint = self.inner.load_checkpoint(path, weights_only=weights_only, **options)
        self._refuse_missing(checkpoint, path)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Pass on."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Pass on."""
        self.inner.teardown()

    def _refuse_missing(self, checkpoint: Mapping[str, Any], path: Any) -> None:
        missing = [p for p in plugins_in(checkpoint) if p.get("changes") and p["name"] not in self.present]
        for plugin in missing:
            text = f"{path} was trained with the plugin {_described(plugin)}, which this Trainer does not have"
            if plugin["changes"] == "structure":
                raise PluginError(f"{text}: the weights would not fit -> add it to callbacks")
            warnings.warn(f"{text}: scores will differ from those in training. Add it to callbacks.", stacklevel=2)


def plugins_in(checkpoint: Any) -> list[Mapping[str, Any]]:
    """What ``checkpoint`` says about its plugins; empty for one without provenance, or with a damaged one."""
    entry = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    plugins = entry.get("plugins") if isinstance(entry, Mapping) else None
    known = plugins if isinstance(plugins, list) else []
    return [p for p in known if isinstance(p, Mapping) and isinstance(p.get("init"), Mapping) and "name" in p]


def _described(plugin: Mapping[str, Any]) -> str:
    dist = f"pip install {plugin['dist']}=={plugin['version']}" if plugin.get("dist") else plugin.get("class")
    return f"{plugin['name']!r} ({dist})"


def wrap_io(host: Host) -> None:
    """Put a :class:`ProvenanceIO` around the Trainer's checkpoint IO, once, and let it speak for this run."""
    strategy = host.trainer.strategy
    io = strategy.checkpoint_io
    if not isinstance(io, ProvenanceIO):
        io = strategy.checkpoint_io = ProvenanceIO(io)
    # Looked up once: reading the metadata of all distributions for every save would be slow.
    rows = installed()
    identities = [_identity(p, rows) for p in host.plugins]
    io.facts = lambda: provenance(host, identities)
    io.present = frozenset(name_of(p) for p in host.plugins)


def freeze_provenance(trainer: Any) -> None:
    """The run closes: later saves repeat its last facts, and hold on to nothing of it."""
    io = trainer.strategy.checkpoint_io
    if isinstance(io, ProvenanceIO):
        # On the other ranks nothing is saved, and plugins count on being asked on the first one only.
        facts = io.facts() if trainer.is_global_zero else {}
        io.facts = lambda: copy.deepcopy(facts)


def provenance(host: Host, identities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry that goes into a checkpoint, in plain types."""
    facts = host.hooks.by_owner("gw_provenance", Mapping)  # type: ignore[type-abstract]
    plugins = [{**known, "facts": to_plain(facts.get(known["name"], {}))} for known in identities]
    return {"version": __version__, "spec_version": specs.SPEC_VERSION, "plugins": plugins}


def _identity(plugin: Any, rows: Sequence[Installed]) -> dict[str, Any]:
    cls = type(plugin)
    row = next((row for row in rows if _is_of(row, cls)), None)
    return {
        "name": name_of(plugin),
        "entry": row.name if row is not None else None,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "dist": row.dist if row is not None else None,
        "version": row.version if row is not None else None,
        "init": init_arguments(plugin),
        "changes": _changes(plugin),
    }


def _changes(plugin: Any) -> str | None:
    if "gw_transform_model" in implementations(plugin):
        return "structure"
    return "scores" if getattr(plugin, "changes", None) == SHIFT else None


def _is_of(row: Installed, cls: type[Any]) -> bool:
    """Whether an entry point means ``cls``: of the same package, which may have it from a module of its own."""
    module, _, name = row.value.partition(":")
    return name == cls.__qualname__ and module.split(".")[0] == cls.__module__.split(".")[0]


def init_arguments(plugin: Any) -> dict[str, Any]:
    """Constructor arguments of ``plugin``, read from attributes of the same names; others than plain ones are left out.

    Example:
        >>> class P:
        ...     def __init__(self, rho=0.05, loss_fn=None):
        ...         self.rho, self.loss_fn = rho, loss_fn
        >>> init_arguments(P(0.1, loss_fn=print))
        {'rho': 0.1}
    """
    names = inspect.signature(type(plugin)).parameters
    values = {name: getattr(plugin, name) for name in names if hasattr(plugin, name)}
    return {name: to_plain(value) for name, value in values.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether ``value`` is made of None, bool, int, float, str, and lists, tuples and string-keyed dicts of these."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def to_plain(value: Any) -> Any:
    """``value`` in plain types; what is not plain becomes its ``repr``, so that a save never fails for it."""
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value if is_plain(value) else repr(value)


def load(
    cls: type[_Module],
    path: Any,
    *,
    plugins: Sequence[Any] | None = None,
    map_location: Any = None,
    strict: bool | None = None,
    **init: Any,
) -> _Module:
    """A LightningModule from a checkpoint, with the structure that its plugins gave it.

    The module is built as by ``cls.load_from_checkpoint``, then changed by the plugins that changed it in training,
    then given its weights. Nothing but tensors and plain types is unpickled.

    Args:
        cls: The LightningModule class.
        path: A checkpoint file.
        plugins: The plugins to use; by default those named in the checkpoint, made again by name and constructor
            arguments.
        map_location: As for ``torch.load``.
        strict: As for ``load_from_checkpoint``.
        init: Constructor arguments of ``cls`` that the checkpoint lacks.

    Raises:
        PluginError: A plugin that changed the model is not installed, or the file holds other objects.
    """
    checkpoint = read(path, map_location)
    if plugins is None:
        needed = [p for p in plugins_in(checkpoint) if p.get("changes") == "structure"]
        plugins = [load_plugin(p.get("entry") or p["name"], **p["init"]) for p in needed]
    with before_restoring(cls, lambda module: _transform(module, plugins)):
        module: _Module = cls.load_from_checkpoint(  # type: ignore[attr-defined]
            path, map_location=map_location, strict=strict, weights_only=True, **init
        )
    return module


def read(path: Any, map_location: Any = None) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain types only.

    Raises:
        PluginError: It holds something else, which is not unpickled.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            raise
        if "weights_only" not in str(error):
            raise PluginError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__} {error}") from error
        raise PluginError(
            f"{path} holds objects other than tensors and plain types, which groundwire does not unpickle -> "
            "save plain hyperparameters, or allow their types with torch.serialization.add_safe_globals. "
            f"{_first_line(error)}"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", _LIGHTNING_KEY} <= checkpoint.keys():
        raise PluginError(
            f"{path} is not a Lightning checkpoint -> give a file that ModelCheckpoint or the Trainer saved"
        )
    return checkpoint


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return lines[0] if lines else ""


def _transform(module: nn.Module, plugins: Sequence[Any]) -> None:
    _hooks_of(list(reversed(plugins))).call("gw_transform_model", module=module)
    remember(module, plugins)


def _hooks_of(plugins: Sequence[Any]) -> Hooks:
    """Implementations outside a run; the last one is called first."""
    hooks = Hooks(lambda name: None)
    for plugin in plugins:
        hooks.register(plugin)
    return hooks


def export(module: _Module, plugins: Sequence[Any] | None = None) -> _Module:
    """A plain copy of ``module``: everything that plugins added is baked into ordinary weights.

    Args:
        module: A model that was trained in a run or came from :func:`load`. It stays as it is.
        plugins: The plugins to bake; by default those that were at work on ``module`` in this process.

    Raises:
        PluginError: A part of ``module`` belongs to a plugin that is not among them.

    Example:
        >>> export(nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    plugins = list(plugins_of(module) if plugins is None else plugins)
    for plugin in plugins:
        if {"gw_transform_model", "gw_export"} & implementations(plugin).keys() == {"gw_transform_model"}:
            raise PluginError(
                f"{name_of(plugin)} changed the model and has no gw_export, so it cannot be taken out again"
            )
    plain = copy.deepcopy(module)
    without_shifts(plain)
    _separate_classes(plain)
    _hooks_of(plugins).call("gw_export", module=plain)
    left = {part for key in plain.state_dict() for part in key.split(".") if part.startswith(BUFFER_PREFIX)}
    if left:
        names = ", ".join(sorted(part.removeprefix(BUFFER_PREFIX) for part in left))
        raise PluginError(f"the model still carries parts of the plugin {names} -> export(module, plugins=[...])")
    return plain


def _separate_classes(module: nn.Module) -> None:
    """Give each parametrized layer of a copy a class of its own.

    torch copies such a layer with its generated class, and ``remove_parametrizations`` deletes the weight's property
    from that class: without this, baking the copy would break the original.
    """
    for child in module.modules():
        if parametrize.is_parametrized(child):
            cls = type(child)
            names = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
            child.__class__ = type(cls.__name__, cls.__bases__, names)
