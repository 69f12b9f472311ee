"""Facts about the user's modules and their layers that several plugins ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: The value of ``changes``, on a plugin and on its forward hook, that says "adds a vector".
SHIFT = "shift"


def outputs_of(layer: nn.Module) -> int:
    """Return the number of scores that a Linear or Conv layer gives.

    Example:
        >>> outputs_of(nn.Linear(2, 3)), outputs_of(nn.Conv2d(1, 4, 3))
        (3, 4)
    """
    name = "out_features" if hasattr(layer, "out_features") else "out_channels"
    return int(getattr(layer, name))


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``module`` or a part of it runs through torch.compile.

    It may have been called before a hook came, and then ignores the hook without a message.

    Example:
        >>> is_compiled(nn.Linear(2, 3))
        False
    """
    return any(
        type(m).__name__ == "OptimizedModule"
        or getattr(m, "_compiled_call_impl", None) is not None
        or getattr(m, "_compiler_ctx", None) is not None
        for m in module.modules()
    )


def overrides(obj: Any, name: str) -> bool:
    """Tell whether a LightningModule, DataModule or callback of either package has a method ``name`` of the user's own.

    Lightning's ``is_overridden`` raises for objects of the other package.

    Example:
        >>> from lightning.pytorch import Callback
        >>> class Mine(Callback):
        ...     def on_fit_start(self, trainer, pl_module): ...
        >>> overrides(Mine(), "on_fit_start"), overrides(Mine(), "on_fit_end")
        (True, False)
    """
    home = getattr(type(obj), name).__module__ or ""
    return home.split(".")[0] not in ("lightning", "pytorch_lightning", "torch")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager that puts ``module`` into evaluation mode, and each submodule back into its own mode.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluating(net):
        ...     net[0].training
        False
        >>> [child.training for child in net]
        [True, False]
    """
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, training in modes:
            child.training = training


def shift_hooks(layer: nn.Module) -> list[Callable[..., Any]]:
    """Return the forward hooks of ``layer`` that say ``changes = "shift"``.

    Such a hook adds a vector that no input of the batch moves, so differences between the scores of one class, and
    Lipschitz bounds, stay as they are.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> class Shift:
        ...     changes = "shift"
        ...     def __call__(self, layer, arguments, output): return output + 1
        >>> _ = layer.register_forward_hook(Shift())
        >>> [type(hook).__name__ for hook in shift_hooks(layer)]
        ['Shift']
    """
    return [hook for hook in layer._forward_hooks.values() if getattr(hook, "changes", None) == SHIFT]


def without_shifts(module: nn.Module) -> None:
    """Take the hooks that :func:`shift_hooks` finds off every layer of ``module``, a copy that was made during a run.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> without_shifts(net)
    """
    for layer in module.modules():
        for key in [key for key, hook in layer._forward_hooks.items() if getattr(hook, "changes", None) == SHIFT]:
            del layer._forward_hooks[key]
