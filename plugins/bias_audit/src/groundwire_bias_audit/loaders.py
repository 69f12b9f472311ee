"""The data loaders and data sets of the running stage."""

from __future__ import annotations

from typing import Any

from groundwire import RunContext


def loader_of(run: RunContext, number: int) -> Any:
    """A data loader of the running stage, as the Trainer prepared it."""
    loaders = run.trainer.test_dataloaders if run.stage == "test" else run.trainer.val_dataloaders
    if hasattr(loaders, "flattened"):
        loaders = loaders.flattened
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    return loaders[number] if isinstance(loaders, list | tuple) else loaders
