"""Putting plugins in order, by name.

A plugin says ``before`` and ``after`` whom it wants to stand, whom it ``conflicts`` with and whom it ``requires``; the
user's list decides everything else.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from groundwire.errors import Problem


def name_of(obj: Any) -> str:
    """Return a plugin's name: its ``name`` attribute, or its class's name in lower case.

    Example:
        >>> name_of(object())
        'object'
    """
    name = getattr(obj, "name", None)
    return name if isinstance(name, str) else type(obj).__name__.lower()


def relation_problems(plugins: Sequence[Any]) -> list[Problem]:
    """Return duplicate names, conflicts and missing requirements among ``plugins``."""
    names = [name_of(p) for p in plugins]
    problems = [_duplicate(name, plugins) for name in dict.fromkeys(names) if names.count(name) > 1]
    for name, plugin in zip(names, plugins, strict=True):
        problems += [
            Problem(name, f"conflicts with {other!r}, which is in the same run", "keep one of the two")
            for other in _relation(plugin, "conflicts")
            if other in names
        ]
        problems += [
            Problem(name, f"requires {other!r}; this run has {', '.join(names)}", f"add the plugin {other!r}")
            for other in _relation(plugin, "requires")
            if other not in names
        ]
    return problems


def _duplicate(name: str, plugins: Sequence[Any]) -> Problem:
    same = [p for p in plugins if name_of(p) == name]
    classes = " and ".join(type(p).__qualname__ for p in same)
    if any(p is q for i, p in enumerate(same) for q in same[i + 1 :]):
        return Problem(name, f"the same {type(same[0]).__qualname__} object is listed twice", "list it once")
    return Problem(name, f"{classes} are both named {name!r}", "give one of them another name")


def _relation(plugin: Any, kind: str) -> Iterable[str]:
    value = getattr(plugin, kind, ())
    return (value,) if isinstance(value, str) else tuple(value)


def resolve(plugins: Sequence[Any]) -> tuple[list[Any], list[Problem]]:
    """Return ``plugins`` in an order that respects every ``before`` and ``after``, as near the given order as possible.

    Names of plugins that are not in the run are ignored. With a cycle the given order comes back beside a
    :class:`~groundwire.Problem` that names it.

    Example:
        >>> class A: name, after = "a", ("b",)
        >>> class B: name = "b"
        >>> [name_of(p) for p in resolve([A(), B()])[0]]
        ['b', 'a']
    """
    index = {name_of(p): i for i, p in enumerate(plugins)}
    graph: dict[int, set[int]] = {i: set() for i in range(len(plugins))}
    for i, plugin in enumerate(plugins):
        graph[i] |= {index[other] for other in _relation(plugin, "after") if other in index}
        for other in _relation(plugin, "before"):
            if other in index:
                graph[index[other]].add(i)
    try:
        return [plugins[i] for i in _stable_sort(graph)], []
    except CycleError as error:
        cycle = " -> ".join(name_of(plugins[i]) for i in error.args[1])
        return list(plugins), [Problem("groundwire", f"before/after form a cycle: {cycle}", "drop one of them")]


def _stable_sort(graph: dict[int, set[int]]) -> list[int]:
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    ready: list[int] = []
    result: list[int] = []
    while sorter.is_active():
        for node in sorter.get_ready():
            heapq.heappush(ready, node)
        result.append(heapq.heappop(ready))
        sorter.done(result[-1])
    return result
