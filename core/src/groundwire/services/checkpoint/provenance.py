"""Provenance: facts about the plugins in every checkpoint.

Every save goes through ``trainer.strategy.save_checkpoint``, also ``weights_only`` saves and saves after ``fit``
returned; the user's ``CheckpointIO`` behind it stays what it is. Only plain types are added, so
``torch.load(weights_only=True)`` keeps working.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
        """Step in front of the strategy's saving and loading, once a Trainer, and let it speak for this run."""
        provenance = provenance_of(self.run.trainer.strategy)
        # Looked up once: reading the metadata of all distributions for every save would be slow.
        rows = installed()
        identities = [_identity(p, rows) for p in self.run.plugins]
        provenance.facts = lambda checkpoint: self._provenance(identities, checkpoint)
        provenance.present = frozenset(name_of(p) for p in self.run.plugins)
        self.run.before_close.append(lambda: self._freeze(provenance))

    def _freeze(self, provenance: Provenance) -> None:
        """Have later saves repeat the run's last facts, and hold on to nothing of it."""
        # On the other ranks nothing is saved, and plugins count on being asked on the first one only.
        first = self.run.trainer.is_global_zero
        facts = provenance.facts({"state_dict": self.run.module.state_dict()}) if first else {}
        provenance.facts = functools.partial(_again, facts)

    def _provenance(self, identities: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entry that goes into a checkpoint, in plain types."""
        mapping: type[Mapping[str, Any]] = Mapping  # type: ignore[type-abstract]
        facts = self.run.hooks.by_owner("gw_provenance", mapping, checkpoint=checkpoint)
        plugins = [{**known, "facts": plain_or_repr(facts.get(known["name"], {}))} for known in identities]
        return {"version": __version__, "spec_version": SPEC_VERSION, "plugins": plugins}


def _again(facts: dict[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts of a run that is over."""
    return copy.deepcopy(facts)


def provenance_of(strategy: Any) -> Provenance:
    """Return what adds provenance to the saves of ``strategy``, which is put in their way when first asked for."""
    found = vars(strategy).get("save_checkpoint")
    provenance = getattr(found, "provenance", None)
    if not isinstance(provenance, Provenance):
        provenance = Provenance(strategy)
        vars(strategy).update(save_checkpoint=_Saving(provenance), load_checkpoint=_Loading(provenance))
    return provenance


class Provenance:
    """Adds provenance to each Lightning checkpoint that a strategy saves, and names plugins that one needs.

    It stays on the Trainer's strategy after the run, so that a later ``trainer.save_checkpoint`` is complete too. The
    user's ``CheckpointIO`` is not touched, and launchers pass this by when they save a bare state dict through it.

    Attributes:
        strategy: The strategy.
        saving: A ``save_checkpoint`` that somebody gave to this strategy alone, or None.
        loading: The same for ``load_checkpoint``.
        facts: What is added, for a checkpoint.
        present: The names of the plugins of the run.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.saving, self.loading = (vars(strategy).get(f"{verb}_checkpoint") for verb in ("save", "load"))
        self.facts: Callable[[Mapping[str, Any]], dict[str, Any]] = functools.partial(_again, {})
        self.present: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take no run along."""
        kept = self.facts if isinstance(self.facts, functools.partial) else functools.partial(_again, {})
        return {**vars(self), "facts": kept}

    def save(self, checkpoint: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """Save with provenance."""
        if LIGHTNING_KEY in checkpoint and self.strategy.is_global_zero:
            checkpoint = {**checkpoint, KEY: self.facts(checkpoint)}
        saving = self.saving or functools.partial(type(self.strategy).save_checkpoint, self.strategy)
        return saving(checkpoint, *arguments, **options)

    def load(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """Load, and say which plugins the checkpoint needs that this Trainer lacks."""
        loading = self.loading or functools.partial(type(self.strategy).load_checkpoint, self.strategy)
        checkpoint = loading(path, *arguments, **options)
        self._refuse_missing(checkpoint, path)
        return checkpoint

    def _refuse_missing(self, checkpoint: Any, path: Any) -> None:
        missing = [p for p in plugins_in(checkpoint) if p.get("changes") and p["name"] not in self.present]
        for plugin in missing:
            text = f"{path} was trained with the plugin {_described(plugin)}, which this Trainer does not have"
            if plugin["changes"] == "structure":
                raise PluginError(f"{text}: the weights would not fit -> add it to callbacks")
            warnings.warn(f"{text}: scores will differ from those in training. Add it to callbacks.", stacklevel=2)


class _Saving:
    """In the place of a strategy's ``save_checkpoint``: no closure, as strategies are copied and pickled."""

    def __init__(self, provenance: Provenance) -> None:
        self.provenance = provenance

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.provenance.save(*arguments, **options)


class _Loading(_Saving):
    """In the place of a strategy's ``load_checkpoint``."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.provenance.load(*arguments, **options)


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
