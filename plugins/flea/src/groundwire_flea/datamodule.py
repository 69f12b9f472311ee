"""The filter around data sets or another DataModule, for those who prefer no callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from groundwire import Fields, PluginError, TrainData
from groundwire.batch import default_fields, unknown_batch
from groundwire.modules import overrides
from groundwire_flea.callback import FLEA
from groundwire_flea.inputs.dataset import SourceDatasets
from groundwire_flea.loader_filter import LoaderFilter, apply_result
from groundwire_flea.result import SavedResult


class FLEADataModule(LightningDataModule):
    """Training data of which only trusted sources are used; everything else as it was given.

    The decision is made when the training loader is first asked for, on rank 0, and is stored in checkpoints. There is
    no report page; :attr:`decision` has what it would show.

    Args:
        data: The training data: data sets by name of their source; a pair of a data set and the source of each row; or
            a LightningDataModule, whose other loaders and hooks are passed on.
        flea: How to decide; ``FLEA()`` when left out. It need not be among the callbacks as well.
        val: Validation loader, if ``data`` is no DataModule.
        test: Test loader, likewise.
        fields: ``fields(batch) -> Fields``, for batches that the default cannot read.
        loader: Arguments of the training DataLoader, if ``data`` is no DataModule; ``{"batch_size": 32, "shuffle":
            True}`` unless changed.

    Attributes:
        decision: What was decided, or None before.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> rows = TensorDataset(torch.randn(60, 2), torch.arange(60) % 2, torch.arange(60) // 2 % 2)
        >>> data = FLEADataModule({"A": rows, "B": rows, "C": rows}, FLEA(groups=2, permutations=0))
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):
        ...     len(data.train_dataloader().dataset)
        120
    """

    def __init__(
        self,
        data: LightningDataModule | Mapping[Any, Dataset[Any]] | tuple[Dataset[Any], Any],
        flea: FLEA | None = None,
        *,
        val: Any = None,
        test: Any = None,
        fields: Callable[[Any], Fields | None] | None = None,
        loader: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.inner = data if isinstance(data, LightningDataModule) else None
        self.flea = flea or FLEA()
        self.decision: SavedResult | None = None
        self._dataset, self._loader_filter = _training_set(data, self.flea)
        self._val, self._test, self._given_fields = val, test, fields
        self._options = {"batch_size": 32, "shuffle": True, **(loader or {})}
        self._hide_missing_loaders()

    def train_dataloader(self) -> Any:
        """The training loader, over rows of trusted sources.

        Raises:
            PluginError: The data cannot be compared.
        """
        inner = self.inner.train_dataloader() if self.inner is not None else DataLoader(self._dataset, **self._options)
        trainer = self.trainer
        module = None if trainer is None else trainer.lightning_module
        self.decision, rows = self._loader_filter.decide(trainer, inner, self.decision, self._fields, module)
        data = TrainData(inner)
        apply_result(self.decision, rows, self.flea.mode, data)
        return data.result()

    def _fields(self, batch: Any) -> Fields:
        found = (self._given_fields(batch) if self._given_fields is not None else None) or default_fields(batch)
        if found is None:
            raise unknown_batch(batch)
        return found

    def prepare_data(self) -> None:
        """Pass on."""
        if self.inner is not None:
            self.inner.prepare_data()

    def setup(self, stage: str) -> None:
        """Pass on."""
        if self.inner is not None:
            self.inner.trainer = self.trainer
            self.inner.setup(stage)

    def teardown(self, stage: str) -> None:
        """Pass on."""
        if self.inner is not None:
            self.inner.teardown(stage)

    def val_dataloader(self) -> Any:
        """The validation loader as it was given."""
        return self._val if self.inner is None else self.inner.val_dataloader()

    def test_dataloader(self) -> Any:
        """The test loader as it was given."""
        return self._test if self.inner is None else self.inner.test_dataloader()

    def predict_dataloader(self) -> Any:
        """The prediction loader as it was given."""
        return None if self.inner is None else self.inner.predict_dataloader()

    def _hide_missing_loaders(self) -> None:
        """Lightning runs a stage if its loader is overridden, so what nobody gave must be the base class's own."""
        for name, given in (
            ("val_dataloader", self._val),
            ("test_dataloader", self._test),
            ("predict_dataloader", None),
        ):
            base = getattr(LightningDataModule, name)
            missing = given is None if self.inner is None else not overrides(self.inner, name)
            if missing:
                setattr(self, name, MethodType(base, self))

    def state_dict(self) -> dict[str, Any]:
        """The decision, and the inner DataModule's state."""
        inner = self.inner.state_dict() if self.inner is not None else {}
        return {"inner": inner, "decision": None if self.decision is None else self.decision.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The decision of the run that is resumed."""
        state = state_dict["decision"]
        self.decision = None if state is None else SavedResult.from_state(state)
        if self.inner is not None:
            self.inner.load_state_dict(state_dict["inner"])


def _training_set(data: Any, flea: FLEA) -> tuple[Any, LoaderFilter]:
    """The data set and its filter: where sources were given, they count."""
    if isinstance(data, LightningDataModule):
        return None, flea.loader_filter
    if isinstance(data, Mapping):
        return SourceDatasets(data), replace(flea.loader_filter, source=None)
    if isinstance(data, tuple) and len(data) == 2:
        return data[0], replace(flea.loader_filter, source=data[1])
    raise PluginError(
        f"FLEADataModule: data is a {type(data).__name__} -> give data sets by source, (data set, source of each row), "
        "or a LightningDataModule"
    )
