"""The module whose forward computes the scores: a model, or the network in a LightningModule without forward."""

from __future__ import annotations

from torch import nn

from groundwire.modules import overrides
from groundwire_aol.errors import UnknownLipschitzError


def has_weights(module: nn.Module) -> bool:
    """Tell whether there is anything that could be converted.

    Example:
        >>> has_weights(nn.Sequential(nn.ReLU()))
        False
    """
    return any(isinstance(part, nn.Linear | nn.modules.conv._ConvNd) for part in module.modules())


def score_module(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the path and module that computes scores.

    It is ``module`` itself, or the only child with weights of a LightningModule without forward.

    Raises:
        UnknownLipschitzError: There is no such module.
    """
    if not is_lightning(module) or overrides(module, "forward"):
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
    """Tell whether it is a LightningModule, of either package."""
    return hasattr(module, "training_step") and hasattr(module, "configure_optimizers")
