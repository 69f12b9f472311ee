"""Who sits where in ``trainer.callbacks`` while a run is open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from groundwire.hooks import implementations
from groundwire.order import name_of, relation_problems, resolve
from groundwire.plugin import Plugin, Plugins
from groundwire.types import Problem


def is_plugin(callback: Any) -> bool:
    """Whether ``callback`` takes part in a run: a Plugin, or any callback that implements a hook."""
    return isinstance(callback, Plugin) or bool(implementations(callback))


class Seating:
    """Expands bundles, resolves the order, and fills the plugins' places in the Trainer's list with it.

    The Trainer's list is replaced, not edited: Lightning's loop over ``setup`` keeps the list that it began with, so
    each ``setup`` runs once.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._original: list[Any] = trainer.callbacks
        self.bundles = [c for c in self._original if isinstance(c, Plugins)]
        self.settings = self.bundles[0] if self.bundles else Plugins()
        self._expanded = [c for callback in self._original for c in self._expand(callback)]
        self._resolved: list[Any] = []

    def resolve(self) -> tuple[list[Any], list[Problem]]:
        """The plugins in resolved order, and everything wrong with the list itself."""
        plugins = [c for c in self._expanded if is_plugin(c)]
        self._resolved, cycles = resolve(plugins)
        return self._resolved, self._bundle_problems() + relation_problems(plugins) + cycles

    @contextmanager
    def taken(self, host: Any) -> Iterator[None]:
        """``host`` first, plugins in resolved order in the plugins' places, everything else where it was."""
        order = iter(self._resolved)
        ours = [next(order) if is_plugin(c) else c for c in self._expanded]
        self._trainer.callbacks = [host, *ours]
        try:
            yield
        finally:
            self._leave(host, ours)

    def inserted_by(self, bundle: Plugins) -> Sequence[Any]:
        """The items of ``bundle`` that are in the run, plugins first in resolved order."""
        items = self._items(bundle)
        return [p for p in self._resolved if p in items] + [c for c in items if not is_plugin(c)]

    def before_plugins(self) -> list[Any]:
        """Callbacks listed before the first plugin, whose setup opens the run."""
        places = [i for i, c in enumerate(self._expanded) if is_plugin(c)]
        return [c for c in self._expanded[: min(places, default=0)] if not is_plugin(c)]

    def _leave(self, host: Any, ours: list[Any]) -> None:
        """Back to the user's own list; what others added meanwhile stays."""
        now = [c for c in self._trainer.callbacks if c is not host]
        if now == ours:
            self._trainer.callbacks = self._original
        else:
            added = [c for c in now if c not in ours]
            self._trainer.callbacks = [c for c in self._original if c in now] + added

    def _expand(self, callback: Any) -> list[Any]:
        return [callback, *self._items(callback)] if isinstance(callback, Plugins) else [callback]

    def _items(self, bundle: Plugins) -> list[Any]:
        return [item for item in bundle.items if name_of(item) not in bundle.off]

    def _bundle_problems(self) -> list[Problem]:
        problems = []
        if len(self.bundles) > 1:
            problems.append(
                Problem("Plugins", f"{len(self.bundles)} Plugins are in one Trainer", "put all items in one")
            )
        for bundle in self.bundles:
            names = [name_of(item) for item in bundle.items]
            if any(isinstance(item, Plugins) for item in bundle.items):
                problems.append(
                    Problem("Plugins", f"a Plugins is inside another (items: {', '.join(names)})", "flatten it")
                )
            for name in bundle.off:
                if name not in names:
                    problems.append(
                        Problem(
                            "Plugins", f"off={name!r} is none of its items ({', '.join(names)})", "correct the name"
                        )
                    )
        return problems
