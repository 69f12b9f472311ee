"""One pluggy manager a run: finding implementations, naming mistakes in them, and calling them.

What is registered is a *seat*, not the plugin: an object with the plugin's implementations and nothing else. So no
property of a LightningModule is touched, and each implementation gets a ``run`` that knows whose it is.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pluggy

from groundwire import specs
from groundwire.errors import PluginError, problems_error
from groundwire.order import name_of
from groundwire.types import Problem

_T = TypeVar("_T")
_MARK = f"{specs.PROJECT}_impl"

SPECS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(spec).parameters)
    for name, spec in vars(specs).items()
    if hasattr(spec, f"{specs.PROJECT}_spec")
}


def implementations(obj: Any) -> dict[str, Callable[..., Any]]:
    """The methods of ``obj`` marked with ``@hookimpl``, bound, by name. No property is evaluated.

    Example:
        >>> class P:
        ...     @specs.hookimpl
        ...     def gw_check(self): ...
        >>> list(implementations(P()))
        ['gw_check']
    """
    found = {name: inspect.getattr_static(type(obj), name) for name in dir(type(obj))}
    return {name: getattr(obj, name) for name, value in found.items() if callable(value) and hasattr(value, _MARK)}


def mistakes(obj: Any, is_plugin: bool) -> list[Problem]:
    """Misspelled hooks, unknown arguments and, on a plugin, ``gw_`` methods without ``@hookimpl``."""
    marked = implementations(obj)
    problems = [p for name, method in marked.items() for p in _mistakes_of(obj, name, method)]
    if is_plugin:
        for name in dir(type(obj)):
            if name.startswith("gw_") and name not in marked and callable(inspect.getattr_static(type(obj), name)):
                problems.append(
                    Problem(name_of(obj), f"{_where(obj, name)} is not marked, so it would never run", "add @hookimpl")
                )
    return problems


def _mistakes_of(obj: Any, name: str, method: Callable[..., Any]) -> list[Problem]:
    options = getattr(method, _MARK)
    if name not in SPECS and options.get("optionalhook"):
        return []  # a hook of a newer groundwire, as the author says
    if options.get("wrapper") or options.get("hookwrapper"):
        return [Problem(name_of(obj), f"{_where(obj, name)} is a wrapper, which no hook allows", "drop wrapper=True")]
    if name not in SPECS:
        nearest = difflib.get_close_matches(name, SPECS, 1, 0.0)[0]
        return [Problem(name_of(obj), f"{_where(obj, name)} is not a hook", f"did you mean {nearest}?")]
    unknown = [a for a in inspect.signature(method).parameters if a not in SPECS[name]]
    return [
        Problem(
            name_of(obj),
            f"{_where(obj, name)} takes {argument!r}, which this hook does not have",
            f"did you mean {difflib.get_close_matches(argument, SPECS[name], 1, 0.0)[0]!r}? It has: "
            + ", ".join(SPECS[name]),
        )
        for argument in unknown
    ]


def _where(obj: Any, name: str) -> str:
    return f"{type(obj).__qualname__}.{name}"


class Hooks:
    """The implementations of one run.

    Args:
        run_for: Gives the ``run`` that implementations of a plugin receive, by the plugin's name.
    """

    def __init__(self, run_for: Callable[[str], Any]) -> None:
        self._manager = pluggy.PluginManager(specs.PROJECT)
        self._manager.add_hookspecs(specs)
        self._run_for = run_for
        self._run = run_for(specs.PROJECT)
        self._seats: dict[str, Any] = {}
        self._callers: dict[tuple[str, tuple[str, ...]], Any] = {}

    def register(self, obj: Any, name: str | None = None) -> None:
        """Add the implementations of ``obj``. Those registered last are called first.

        Raises:
            PluginError: The name is taken.
        """
        name = name or name_of(obj)
        if name in self._seats:
            raise problems_error([Problem(name, f"two implementers are named {name!r}", "rename one of them")])
        seat = self._seats[name] = _Seat()
        for hook, method in implementations(obj).items():
            if hook not in SPECS:
                continue
            setattr(seat, hook, _with_run(method, self._run_for(name)))
        self._manager.register(seat, name=name)
        self._callers.clear()

    def owners(self, hook: str) -> list[str]:
        """Names of those that implement ``hook``, in call order."""
        caller = getattr(self._manager.hook, hook)
        return [impl.plugin_name for impl in reversed(caller.get_hookimpls())]

    def call(self, hook: str, *, only: Sequence[str] | None = None, **arguments: Any) -> Any:
        """Call ``hook``; with ``only``, only the implementations of these names."""
        caller = getattr(self._manager.hook, hook) if only is None else self._caller(hook, tuple(only))
        return caller(run=self._run, **arguments)

    def _caller(self, hook: str, only: tuple[str, ...]) -> Any:
        if (hook, only) not in self._callers:
            others = [seat for name, seat in self._seats.items() if name not in only]
            self._callers[hook, only] = self._manager.subset_hook_caller(hook, others)
        return self._callers[hook, only]

    def collect(self, hook: str, kind: type[_T], **arguments: Any) -> list[_T]:
        """All items of all lists that the implementations return.

        Raises:
            PluginError: An implementation returned something other than a list or tuple of ``kind``, or None.
        """
        items: list[_T] = []
        for name, result in self.by_owner(hook, object, **arguments).items():
            if not isinstance(result, list | tuple):
                raise _wrong(name, hook, f"a list of {kind.__name__}", result)
            for item in result:
                if not isinstance(item, kind):
                    raise _wrong(name, hook, f"a list of {kind.__name__}", item)
            items += result
        return items

    def by_owner(self, hook: str, kind: type[_T], **arguments: Any) -> dict[str, _T]:
        """What each implementation returned (None left out), by its name.

        Raises:
            PluginError: An implementation returned something other than ``kind`` or None.
        """
        results = {name: self.call(hook, only=[name], **arguments) for name in self.owners(hook)}
        for name, found in results.items():
            if found and not isinstance(found[0], kind):
                raise _wrong(name, hook, kind.__name__, found[0])
        return {name: found[0] for name, found in results.items() if found}


def _wrong(name: str, hook: str, wanted: str, found: Any) -> PluginError:
    return PluginError(f"{name}: {hook} must return {wanted} or None, got {type(found).__name__}: {found!r}")


class _Seat:
    """Carries one plugin's implementations into the manager."""


def _with_run(method: Callable[..., Any], run: Any) -> Callable[..., Any]:
    """``method`` with its ``run`` argument replaced by the plugin's own view."""
    names = tuple(inspect.signature(method).parameters)
    if "run" not in names:
        return method
    place = names.index("run")

    @functools.wraps(method)
    def call(*arguments: Any) -> Any:
        return method(*arguments[:place], run, *arguments[place + 1 :])

    return call
