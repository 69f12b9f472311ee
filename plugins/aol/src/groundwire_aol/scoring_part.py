"""The part of a module that computes scores, and putting layers into it."""

from __future__ import annotations

from torch import nn

from groundwire_aol.errors import UnknownLipschitzError


def has_weights(module: nn.Module) -> bool:
    """Whether there is anything that could be converted.

    Example:
        >>> has_weights(nn.Sequential(nn.ReLU()))
        False
    """
    return any(isinstance(part, nn.Linear | nn.modules.conv._ConvNd) for part in module.modules())


def core_of(module: nn.Module) -> tuple[str, nn.Module]:
    """The part that computes scores: ``module``, or the only child with weights of a LightningModule without forward.

    Raises:
        UnknownLipschitzError: There is no such part.
    """
    home = (getattr(type(module).forward, "__module__", "") or "").split(".")[0]
    if not is_lightning(module) or home not in ("lightning", "pytorch_lightning", "torch"):
        return "", module
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    if len(children) != 1:
        names = ", ".join(name for name, _ in children) or "none"
        raise UnknownLipschitzError(
            type(module).__name__,
            f"it has no forward, and its submodules with weights are: {names}",
            "define forward(self, x) so that it returns the scores",
        )
    return children[0]


def is_lightning(module: nn.Module) -> bool:
    """Whether it is a LightningModule, of either package."""
    return hasattr(module, "training_step") and hasattr(module, "configure_optimizers")


def put(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Place ``new`` at ``path`` in ``module``."""
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    if isinstance(holder, nn.Sequential | nn.ModuleList):
        holder._modules[name] = new
    else:
        setattr(holder, name, new)
    return module
