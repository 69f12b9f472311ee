"""Provenance: facts about the plugins in every checkpoint.

Every save goes through ``trainer.strategy.checkpoint_io``, a documented extension point, also ``weights_only`` saves
and saves after ``fit`` returned. Only plain types are added, so ``torch.load(weights_only=True)`` keeps working.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from groundwire.discovery import Installed, init_arguments, installed
from groundwire.errors import PluginError
from groundwire.hooks.markers import SPEC_VERSION
from groundwire.hooks.ordering import name_of
from groundwire.hooks.registry import implementations
from groundwire.modules import SHIFT
from groundwire.plain import plain_or_repr
from groundwire.service import Service
from groundwire.version import __version__

#: The key in a checkpoint.
KEY = "groundwire"
LIGHTNING_KEY = "pytorch-lightning_version"


class CheckpointService(Service):
    """Adds provenance to what the run's Trainer saves."""

    name = "groundwire-checkpoint"

    def open(self) -> None:
        """Put a :class:`ProvenanceIO` around the Trainer's checkpoint IO, once, and let it speak for this run."""
        strategy = self.run.trainer.strategy
        io = strategy.checkpoint_io
        if not isinstance(io, ProvenanceIO):
            io = strategy.checkpoint_io = ProvenanceIO(io)
        # Looked up once: reading the metadata of all distributions for every save would be slow.
        rows = installed()
        identities = [_identity(p, rows) for p in self.run.plugins]
        io.facts = lambda: self._provenance(identities)
        io.present = frozenset(name_of(p) for p in self.run.plugins)
        self.run.before_close.append(self._freeze)

    def _freeze(self) -> None:
        """Have later saves repeat the run's last facts, and hold on to nothing of it."""
        trainer = self.run.trainer
        io = trainer.strategy.checkpoint_io
        if isinstance(io, ProvenanceIO):
            # On the other ranks nothing is saved, and plugins count on being asked on the first one only.
            facts = io.facts() if trainer.is_global_zero else {}
            io.facts = lambda: copy.deepcopy(facts)

    def _provenance(self, identities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the entry that goes into a checkpoint, in plain types."""
        facts = self.run.hooks.by_owner("gw_provenance", Mapping)  # type: ignore[type-abstract]
        plugins = [{**known, "facts": plain_or_repr(facts.get(known["name"], {}))} for known in identities]
        return {"version": __version__, "spec_version": SPEC_VERSION, "plugins": plugins}


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
        if LIGHTNING_KEY in checkpoint:
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
    """Return what ``checkpoint`` says about its plugins; empty for one without provenance, or with a damaged one."""
    entry = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    plugins = entry.get("plugins") if isinstance(entry, Mapping) else None
    known = plugins if isinstance(plugins, list) else []
    return [p for p in known if isinstance(p, Mapping) and isinstance(p.get("init"), Mapping) and "name" in p]


def _described(plugin: Mapping[str, Any]) -> str:
    dist = f"pip install {plugin['dist']}=={plugin['version']}" if plugin.get("dist") else plugin.get("class")
    return f"{plugin['name']!r} ({dist})"


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
    """Tell whether an entry point means ``cls``: of the same package, which may have it from a module of its own."""
    module, _, name = row.value.partition(":")
    return name == cls.__qualname__ and module.split(".")[0] == cls.__module__.split(".")[0]
