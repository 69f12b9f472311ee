"""The errors that groundwire raises on purpose."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException


class PluginError(MisconfigurationException):
    """A plugin cannot be found, imported or made; the text says which one, why, and what to do."""
