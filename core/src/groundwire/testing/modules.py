"""The kit's LightningModule: BatchNorm, dropout, a scheduler and logged metrics, for either Lightning package."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from groundwire.testing.loaders import CLASSES

if TYPE_CHECKING:
    _Base = LightningModule
else:
    # The base comes last in `of_package`: it differs between the two packages.
    _Base = object


def network() -> nn.Sequential:
    """The kit's network: 1x8x8 images to 4 scores, the same weights each time, no draw from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*convolution, nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * 6 * 6, CLASSES))


class _Steps(_Base):
    """Everything but the base class."""

    early = True

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module | None = network() if self.early else None

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        scores: Tensor = self.net(x)
        return scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores: Tensor = self(batch[0])
        return scores

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, stage: str, batch: Any) -> None:
        scores = self(batch[0])
        self.log(f"{stage}_loss", nn.functional.cross_entropy(scores, batch[1]))
        self.log(f"{stage}_accuracy", (scores.argmax(1) == batch[1]).float().mean())


class _BuiltInSetup(_Steps):
    early = False

    def setup(self, stage: str) -> None:
        self.net = self.net or network()


class _BuiltInConfigureModel(_Steps):
    early = False

    def configure_model(self) -> None:
        self.net = self.net or network()


_PARTS: dict[str, type] = {
    "eager": _Steps,
    "LightningModule.setup": _BuiltInSetup,
    "configure_model": _BuiltInConfigureModel,
}


def of_package(package: ModuleType, built_in: str = "eager") -> type[Any]:
    """The kit's module as a class of ``package``.

    Args:
        package: ``lightning.pytorch`` or ``pytorch_lightning``.
        built_in: Where the network is made: ``"eager"``, ``"LightningModule.setup"`` or ``"configure_model"``.

    Raises:
        KeyError: ``built_in`` is none of the three.
    """
    return type("Classifier", (_PARTS[built_in], package.LightningModule), {"__module__": __name__})


class Classifier(_Steps, LightningModule):
    """The kit's module: a small BatchNorm network with dropout, SGD with momentum and a step scheduler.

    It takes batches ``(x, y, ...)`` with x of shape (B, 1, 8, 8) and y in 0...3, and logs ``train_loss``,
    ``val_loss``, ``val_accuracy``, ``test_loss`` and ``test_accuracy``.

    Example:
        >>> Classifier()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4])
    """


def without_dropout(module: Any) -> Any:
    """``module`` with every dropout rate 0: a resume could not repeat masks drawn from the global random state."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
    return module
