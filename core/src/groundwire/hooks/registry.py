"""The implementations of hooks: finding them, naming mistakes in them, and calling them.

A run has one pluggy manager. What is registered in it is not the plugin, but an object with the plugin's
implementations and nothing else. So no property of a LightningModule is touched, and each implementation gets a ``run``
that knows whose it is.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import pluggy

from groundwire.errors import PluginError, Problem, problems_error
from groundwire.hooks.markers import PROJECT
from groundwire.hooks.ordering import name_of

_T = TypeVar("_T")
_MARK = f"{PROJECT}_impl"


def specified(namespace: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the arguments of each hook that ``namespace`` specifies, by its name."""
    marked = {name: spec for name, spec in namespace.items() if hasattr(spec, f"{PROJECT}_spec")}
    return {name: tuple(inspect.signature(spec).parameters) for name, spec in marked.items()}


def implementations(obj: Any) -> dict[str, Callable[..., Any]]:
    """Return the methods of ``obj`` marked with ``@hookimpl``, bound, by name. No property is evaluated.

    Example:
        >>> from groundwire import hookimpl
        >>> class P:
        ...     @hookimpl
        ...     def gw_check(self): ...
        >>> list(implementations(P()))
        ['gw_check']
    """
    found = {name: inspect.getattr_static(type(obj), name) for name in dir(type(obj))}
    return {name: getattr(obj, name) for name, value in found.items() if callable(value) and hasattr(value, _MARK)}


def call_outside_run(plugins: Iterable[Any], hook: str, **arguments: Any) -> None:
    """Call ``hook`` of each of ``plugins`` that has it, in this order, with those of ``arguments`` that it takes."""
    for plugin in plugins:
        method = implementations(plugin).get(hook)
        if method is not None:
            names = inspect.signature(method).parameters
            method(**{name: value for name, value in arguments.items() if name in names})


#: Class attributes of plugins whose absence nobody would notice, but the plugin's user.
ATTRIBUTES = ("score_stages", "needs_features", "needs_ids", "skips_nonfinite", "conflicts", "requires")


def misspelled_attributes(obj: Any) -> list[Problem]:
    """Return the class attributes of a plugin that are a letter away from one of :data:`ATTRIBUTES`.

    Example:
        >>> class Scores: need_ids = True
        >>> misspelled_attributes(Scores())[0].hint
        'did you mean needs_ids?'
    """
    cls, problems = type(obj), []
    for name in dir(cls):
        if name.startswith("_") or name in ATTRIBUTES or callable(inspect.getattr_static(cls, name)):
            continue
        for right in difflib.get_close_matches(name, ATTRIBUTES, 1, 0.9):
            text = f"{cls.__qualname__}.{name} is not an attribute of plugins"
            problems.append(Problem(name_of(obj), text, f"did you mean {right}?"))
    return problems


class Hooks:
    """The implementations of one run.

    Args:
        specs: The module that specifies the hooks.
        run_for: Gives the ``run`` that implementations of a plugin receive, by the plugin's name.

    Attributes:
        implemented: The hooks that somebody implements.
    """

    def __init__(self, specs: ModuleType, run_for: Callable[[str], Any]) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(specs)
        self._arguments = specified(vars(specs))
        self._silent = {name for name in self._arguments if getattr(specs, name).__annotations__["return"] == "None"}
        self._run_for = run_for
        self._run = run_for(PROJECT)
        self.implemented: set[str] = set()
        self._registered: dict[str, Any] = {}
        self._callers: dict[tuple[str, tuple[str, ...]], Any] = {}

    def register(self, obj: Any, name: str | None = None) -> None:
        """Add the implementations of ``obj``. Those registered last are called first.

        Raises:
            PluginError: The name is taken.
        """
        name = name or name_of(obj)
        if name in self._registered:
            raise problems_error([Problem(name, f"two implementers are named {name!r}", "rename one of them")])
        implementer = self._registered[name] = _Implementer()
        for hook, method in implementations(obj).items():
            if hook in self._arguments:
                guarded = _guarded(method, self._run_for(name), name, hook, hook not in self._silent)
                setattr(implementer, hook, guarded)
                self.implemented.add(hook)
        self._manager.register(implementer, name=name)
        self._callers.clear()

    def mistakes(self, obj: Any, is_plugin: bool) -> list[Problem]:
        """Return misspelled hooks and arguments; on a plugin, also attributes, and methods without ``@hookimpl``."""
        marked = implementations(obj)
        problems = [p for name, method in marked.items() for p in self._mistakes_of(obj, name, method)]
        if is_plugin:
            problems += misspelled_attributes(obj)
            for name in dir(type(obj)):
                if name.startswith("gw_") and name not in marked and callable(inspect.getattr_static(type(obj), name)):
                    text = f"{type(obj).__qualname__}.{name} is not marked, so it would never run"
                    problems.append(Problem(name_of(obj), text, "add @hookimpl"))
        return problems

    def _mistakes_of(self, obj: Any, name: str, method: Callable[..., Any]) -> list[Problem]:
        options, where, specs = getattr(method, _MARK), f"{type(obj).__qualname__}.{name}", self._arguments
        if name not in specs and options.get("optionalhook"):
            return []  # a hook of a newer groundwire, as the author says
        if options.get("wrapper") or options.get("hookwrapper"):
            return [Problem(name_of(obj), f"{where} is a wrapper, which no hook allows", "drop wrapper=True")]
        if name not in specs:
            nearest = difflib.get_close_matches(name, specs, 1, 0.0)[0]
            return [Problem(name_of(obj), f"{where} is not a hook", f"did you mean {nearest}?")]
        return [
            Problem(
                name_of(obj),
                f"{where} takes {argument!r}, which this hook does not have",
                f"did you mean {difflib.get_close_matches(argument, specs[name], 1, 0.0)[0]!r}? It has: "
                + ", ".join(specs[name]),
            )
            for argument in inspect.signature(method).parameters
            if argument not in specs[name]
        ]

    def owners(self, hook: str) -> list[str]:
        """Return the names of those that implement ``hook``, in call order."""
        caller = getattr(self._manager.hook, hook)
        return [impl.plugin_name for impl in reversed(caller.get_hookimpls())]

    def call(self, hook: str, *, only: Sequence[str] | None = None, **arguments: Any) -> Any:
        """Call ``hook``; with ``only``, only the implementations of these names."""
        caller = getattr(self._manager.hook, hook) if only is None else self._caller(hook, tuple(only))
        return caller(run=self._run, **arguments)

    def _caller(self, hook: str, only: tuple[str, ...]) -> Any:
        if (hook, only) not in self._callers:
            others = [implementer for name, implementer in self._registered.items() if name not in only]
            self._callers[hook, only] = self._manager.subset_hook_caller(hook, others)
        return self._callers[hook, only]

    def collect(self, hook: str, kind: type[_T], **arguments: Any) -> list[_T]:
        """Return all items of all lists that the implementations return.

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
        """Return what each implementation returned (None left out), by its name.

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


class _Implementer:
    """Carries one plugin's implementations into the manager."""


def _guarded(method: Callable[..., Any], run: Any, name: str, hook: str, returns: bool) -> Callable[..., Any]:
    """Return ``method`` with the plugin's own view of the run, whose mistakes are told by plugin and hook.

    Args:
        method: An implementation.
        run: What it gets as ``run``, if it takes that.
        name: The plugin's name.
        hook: The hook's name.
        returns: Whether anybody takes what the hook returns.
    """
    names = tuple(inspect.signature(method).parameters)
    place = names.index("run") if "run" in names else None

    @functools.wraps(method)
    def call(*arguments: Any) -> Any:
        given = arguments if place is None else (*arguments[:place], run, *arguments[place + 1 :])
        try:
            result = method(*given)
        except StopIteration as error:
            # Lightning's loops take it for the end of the data, and training would end as if it were finished.
            text = f"{name}: {hook} raised StopIteration ({error}), which would end the epoch"
            raise PluginError(f"{text} -> catch it, or give next() a default") from error
        if not returns and result is not None and not any(result is argument for argument in given):
            raise PluginError(
                f"{name}: {hook} must return None, got {type(result).__name__}, which nobody takes -> change what it "
                "is given in place"
            )
        return result

    return call
