"""Find installed plugins by name, from their metadata alone, and import one when it is asked for.

A distribution makes its plugin known with an entry point in the group ``groundwire`` whose value is the plugin class::

    [project.entry-points.groundwire]
    mine = "my_package:MyPlugin"

Nothing here imports torch or Lightning, so that the command line answers at once.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from groundwire.plain import is_plain, plain_or_repr

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

GROUP = "groundwire"
UNKNOWN = "unknown"
#: Names of plugins, separated by commas, that must be treated as if they were not installed.
DISABLE = "GROUNDWIRE_DISABLE"

Status: TypeAlias = Literal["found", "ok", "failed", "disabled", "duplicate"]


@dataclass(frozen=True)
class Installed:
    """One line of the table of installed plugins.

    Attributes:
        name: What :func:`load_plugin` takes.
        value: Where the class is, as ``module:Class``.
        dist: The distribution that brings it.
        version: The version of that distribution.
        status: ``"found"`` (metadata only, not imported), ``"ok"`` (imported), ``"failed"``, ``"disabled"`` (named in
            the environment variable ``GROUNDWIRE_DISABLE``) or ``"duplicate"`` (two distributions give one name).
        reason: Why the plugin cannot be used, empty otherwise.

    Example:
        >>> Installed("mine", "mine:Mine", "groundwire-mine", "1.0", "found").reason
        ''
    """

    name: str
    value: str
    dist: str
    version: str
    status: Status
    reason: str = ""


def installed(check: bool = False) -> tuple[Installed, ...]:
    """Return the table of installed plugins, sorted by name.

    Args:
        check: Import each plugin that is neither disabled nor a duplicate. One that fails never breaks another.

    Returns:
        One record for each entry point in the group ``groundwire``.

    Example:
        >>> all(row.status != "ok" for row in installed())  # nothing was imported
        True
    """
    rows = _judge([row for dist in _distributions() for row in _rows(dist)])
    return tuple(_imported(row) if check and row.status == "found" else row for row in rows)


def load_plugin(name: str, /, **init: Any) -> Callback:
    """Import the plugin called ``name`` and make one.

    Args:
        name: The name of its entry point, as shown by ``groundwire plugins``.
        **init: Arguments of the plugin class.

    Returns:
        A plugin, ready for ``Trainer(callbacks=[...])``.

    Raises:
        PluginError: There is no such plugin, it is disabled, two distributions claim the name, its import fails, or it
            does not take these arguments. What the plugin's own ``__init__`` raises is passed on.

    Example:
        >>> load_plugin("no-such-plugin")
        Traceback (most recent call last):
            ...
        groundwire.errors.PluginError: No plugin is called 'no-such-plugin'...
    """
    rows = installed()
    row = next((row for row in rows if row.name == name), None)
    if row is None:
        _refuse(_unknown(name, [row.name for row in rows]))
    if row.status != "found":
        _refuse(f"Plugin {name!r} cannot be loaded ({row.status}): {row.reason}.")
    try:
        cls = _import(row)
    except (Exception, SystemExit) as error:
        _refuse(f"Plugin {name!r} of {row.dist} {row.version} cannot be imported: {_text(error)}.", error)
    _check_arguments(cls, name, init)
    plugin: Callback = cls(**init)
    return plugin


def init_arguments(plugin: Any) -> dict[str, Any]:
    """Return the plain constructor arguments of ``plugin``, read from attributes of the same names.

    Example:
        >>> class P:
        ...     def __init__(self, rho=0.05, loss_fn=None):
        ...         self.rho, self.loss_fn = rho, loss_fn
        >>> init_arguments(P(0.1, loss_fn=print))
        {'rho': 0.1}
    """
    names = inspect.signature(type(plugin)).parameters
    values = {name: getattr(plugin, name) for name in names if hasattr(plugin, name)}
    return {name: plain_or_repr(value) for name, value in values.items() if is_plain(value)}


def _distributions() -> Iterator[Distribution]:
    # `importlib.metadata.entry_points` raises when any distribution on the path has a malformed file, so each is read
    # on its own. The first of equal names is the one that Python imports.
    seen = set()
    for dist in distributions():
        name = _label(dist)[0].lower().replace("_", "-").replace(".", "-")
        if name == UNKNOWN or name not in seen:
            seen.add(name)
            yield dist


def _rows(dist: Distribution) -> Iterator[Installed]:
    label = _label(dist)
    try:
        points = [point for point in dist.entry_points if point.group == GROUP]
    except Exception as error:
        if f"[{GROUP}]" in (dist.read_text("entry_points.txt") or ""):
            yield Installed(label[0], "", *label, "failed", f"its entry_points.txt cannot be read ({_text(error)})")
        return
    for point in points:
        yield Installed(point.name, point.value, *label, "found")


def _label(dist: Distribution) -> tuple[str, str]:
    try:
        metadata = dist.metadata
        name, version = (str(metadata[key]) if key in metadata else UNKNOWN for key in ("Name", "Version"))
    except Exception:  # half removed or damaged: it must not hide the others
        return UNKNOWN, UNKNOWN
    return name, version


def _judge(rows: list[Installed]) -> list[Installed]:
    off = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
    owners = defaultdict(list)
    for row in rows:
        owners[row.name].append(f"{row.dist} {row.version}")

    def judge(row: Installed) -> Installed:
        if row.name in off:
            return replace(row, status="disabled", reason=f"named in the environment variable {DISABLE}")
        if len(owners[row.name]) > 1:
            reason = f"{' and '.join(sorted(owners[row.name]))} give the same name; uninstall one"
            return replace(row, status="duplicate", reason=reason)
        return row

    return sorted(map(judge, rows), key=lambda row: (row.name, row.dist))


def _imported(row: Installed) -> Installed:
    try:
        _import(row)
    except (Exception, SystemExit) as error:
        return replace(row, status="failed", reason=_text(error))
    return replace(row, status="ok")


def _import(row: Installed) -> type[Any]:
    cls = EntryPoint(row.name, row.value, GROUP).load()
    if not isinstance(cls, type):
        raise TypeError(f"{row.value} is not a class but {cls!r}")
    return cls


def _check_arguments(cls: type[Any], name: str, init: dict[str, Any]) -> None:
    signature = inspect.signature(cls)
    try:
        signature.bind(**init)
    except TypeError as error:
        _refuse(f"Plugin {name!r} does not take these arguments: {error}. It is made by {cls.__name__}{signature}.")


def _unknown(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    have = ", ".join(dict.fromkeys(names)) or "none"
    return f"No plugin is called {name!r}{guess} Installed: {have}. Others: pip install groundwire-<name>."


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": .")


def _refuse(message: str, cause: BaseException | None = None) -> NoReturn:
    # Lightning takes a second to import, and only an error needs it.
    from groundwire.errors import PluginError

    raise PluginError(message) from cause
