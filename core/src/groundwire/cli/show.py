"""``groundwire show CKPT``: look into a checkpoint without running anything that it holds."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from groundwire.cli.terminal import CommandError, line, table
from groundwire.display import show as text


def show(checkpoint: Path) -> int:
    """Print what a checkpoint holds; nothing in it is run.

    Args:
        checkpoint: A file that Trainer.save_checkpoint or ModelCheckpoint wrote.
    """
    content = _load(checkpoint)
    if not isinstance(content, Mapping) or "pytorch-lightning_version" not in content:
        raise CommandError(f"{checkpoint} is not a checkpoint of Lightning. Give a file that the Trainer saved.")
    table(["", ""], _facts(checkpoint, content))
    provenance = content.get("groundwire")
    if isinstance(provenance, Mapping):
        _show_plugins(provenance)
    else:
        line("Made without groundwire: it names no plugins.")
    return 0


def _load(checkpoint: Path) -> Any:
    if not checkpoint.is_file():
        what = "is a folder" if checkpoint.is_dir() else "does not exist"
        raise CommandError(f"{checkpoint} {what}. Give a checkpoint file, usually *.ckpt.")

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's version; what cannot be read raises
            # Memory-mapped, so that the size of the weights does not matter; old formats are not zip files.
            mmap = zipfile.is_zipfile(checkpoint)
            return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            what = f"holds an object of type {refused[1]}, which is not plain data. Loading it could run code"
            raise CommandError(f"{checkpoint} {what}, so it was refused and nothing was run.") from error
        raise CommandError(f"{checkpoint} is not a checkpoint, or is damaged ({type(error).__name__}).") from error


def _facts(checkpoint: Path, content: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    tensors = list(_tensors(content.get("state_dict")))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    yield "Lightning", str(content["pytorch-lightning_version"])
    yield "epoch", text(content.get("epoch"))
    yield "global step", text(content.get("global_step"))
    yield "tensors", text(len(tensors))
    yield "parameters and buffers", text(sum(tensor.numel() for tensor in tensors))
    yield "size of the tensors", f"{text(size)} bytes"
    yield "size of the file", f"{text(checkpoint.stat().st_size)} bytes"
    yield "callbacks with state", ", ".join(map(str, _mapping(content.get("callbacks")))) or "none"


def _tensors(state: Any) -> Iterable[Any]:
    return (value for value in _mapping(state).values() if hasattr(value, "element_size"))


def _show_plugins(provenance: Mapping[str, Any]) -> None:
    line(f"groundwire {provenance.get('version')}, hooks version {provenance.get('spec_version')}")
    found = provenance.get("plugins")
    rows = [
        (plugin.get("name"), plugin.get("class"), f"{plugin.get('dist')} {plugin.get('version')}", *_details(plugin))
        for plugin in (found if isinstance(found, list | tuple) else [])
        if isinstance(plugin, Mapping)
    ]
    table(["plugin", "class", "from", "arguments", "facts"], rows)


def _details(plugin: Mapping[str, Any]) -> tuple[str, str]:
    return text(_mapping(plugin.get("init"))), text(_mapping(plugin.get("facts")))


def _mapping(value: Any) -> dict[Any, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
