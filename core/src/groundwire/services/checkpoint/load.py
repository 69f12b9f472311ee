"""Models from checkpoints, with the structure that plugins gave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from groundwire._lightning import before_restoring
from groundwire.discovery import load_plugin
from groundwire.errors import PluginError
from groundwire.hooks.changed_models import remember
from groundwire.hooks.registry import call_outside_run
from groundwire.services.checkpoint.provenance import LIGHTNING_KEY, plugins_in

_Module = TypeVar("_Module", bound=nn.Module)


def load(
    cls: type[_Module],
    path: Any,
    *,
    plugins: Sequence[Any] | None = None,
    map_location: Any = None,
    strict: bool | None = None,
    **init: Any,
) -> _Module:
    """Return a LightningModule from a checkpoint, with the structure that its plugins gave it.

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
    """Return a checkpoint's content, tensors and plain types only.

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
    if not isinstance(checkpoint, dict) or not {"state_dict", LIGHTNING_KEY} <= checkpoint.keys():
        raise PluginError(
            f"{path} is not a Lightning checkpoint -> give a file that ModelCheckpoint or the Trainer saved"
        )
    return checkpoint


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return lines[0] if lines else ""


def _transform(module: nn.Module, plugins: Sequence[Any]) -> None:
    call_outside_run(plugins, "gw_transform_model", module=module, run=None)
    remember(module, plugins)
