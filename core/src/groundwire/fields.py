"""Core's own answer to "what does this batch hold"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from groundwire.errors import PluginError
from groundwire.specs import hookimpl
from groundwire.types import Fields

#: Keys by role, the first one present counts.
KEYS = {
    "inputs": ("inputs", "x", "input", "image", "features", "input_ids"),
    "targets": ("targets", "y", "target", "label", "labels"),
    "groups": ("groups", "group", "sensitive"),
    "source": ("source",),
    "time": ("time", "timestamp"),
    "ids": ("ids", "id", "index"),
}


_ROLES = {key: (role, place) for role, keys in KEYS.items() for place, key in enumerate(keys)}


def _from_mapping(batch: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    places: dict[str, int] = {}
    for key in batch:
        role, place = _ROLES.get(key, (None, 0))
        if role is not None and place <= places.get(role, place):
            found[role], places[role] = batch[key], place
    return found


def default_fields(batch: Any) -> Fields | None:
    """Fields of a tensor, ``(x,)``, ``(x, y)``, ``(x, y, meta dict)`` or a mapping with the usual keys.

    Returns:
        None if the batch is of another shape.

    Example:
        >>> default_fields({"image": 1, "label": 2, "group": 3})
        Fields(inputs=1, targets=2, groups=3, source=None, time=None, ids=None)
        >>> default_fields((1, 2, {"time": 5})).time
        5
    """
    if isinstance(batch, Mapping):
        found = _from_mapping(batch)
        return Fields(**found) if "inputs" in found else None
    if not isinstance(batch, list | tuple):
        return Fields(batch) if hasattr(batch, "shape") else None
    if len(batch) == 3 and isinstance(batch[2], Mapping):
        return Fields(**{**_from_mapping(batch[2]), "inputs": batch[0], "targets": batch[1]})
    return Fields(*batch) if 1 <= len(batch) <= 2 else None


class DefaultFields:
    """The last implementer of ``gw_fields``."""

    name = "groundwire-default-fields"

    @hookimpl(trylast=True)
    def gw_fields(self, batch: Any) -> Fields | None:
        """Answer with :func:`default_fields`."""
        return default_fields(batch)


class GivenFields:
    """The user's ``Plugins(fields=...)``, the first implementer of ``gw_fields``."""

    name = "groundwire-given-fields"

    def __init__(self, fields: Callable[[Any], Fields | None]) -> None:
        self._fields = fields

    @hookimpl(tryfirst=True)
    def gw_fields(self, batch: Any) -> Fields | None:
        """Answer with the user's callable."""
        return self._fields(batch)


def unknown_batch(batch: Any) -> PluginError:
    """The error for a batch that nobody can read."""
    shape = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
    if isinstance(batch, list | tuple):
        shape += f" of {len(batch)}"
    return PluginError(
        f"cannot tell what this batch holds ({shape}) -> pass Plugins(fields=lambda batch: Fields(...)) or implement "
        "gw_fields on the LightningModule or DataModule"
    )
