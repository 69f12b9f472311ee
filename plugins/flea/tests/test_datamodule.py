"""FLEADataModule, without a callback."""

import lightning.pytorch as pl
import pytest
import torch
from flea_clinics_of_tests import GOOD, Net, Rows, tensors
from torch.utils.data import DataLoader, TensorDataset

from groundwire import PluginError
from groundwire_flea import FLEA, FLEADataModule

pytestmark = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


def parts_by_source(data):
    names = sorted(set(data.source))
    return {s: tensors(type(data)(**{k: v[data.source == s] for k, v in vars(data).items()})) for s in names}


def test_a_flea_datamodule_filters_by_itself_and_resumes(kit, bad):
    def make():
        val = DataLoader(tensors(bad), 64)
        return FLEADataModule(parts_by_source(bad), FLEA(groups=2, permutations=0), val=val, loader={"batch_size": 16})

    data, module = make(), Net()
    trainer = kit.trainer()
    trainer.fit(module, datamodule=data)
    assert data.decision.named(False) == ["clinic 1", "clinic 3"]
    assert len(trainer.train_dataloader.dataset) == sum(s in GOOD for s in bad.source)
    assert trainer.train_dataloader.batch_size == 16
    assert len(trainer.val_dataloaders.dataset) == len(bad.y)
    trainer.save_checkpoint(kit.path / "dm.ckpt")
    again = make()
    loader_filter = data._loader_filter
    again._loader_filter = type("Remembers", (type(loader_filter),), {"_compare": None})(**vars(loader_filter))
    kit.trainer(max_epochs=2).fit(Net(), datamodule=again, ckpt_path=kit.path / "dm.ckpt", weights_only=True)
    assert again.decision == data.decision


def test_a_flea_datamodule_around_a_datamodule_and_around_a_pair(kit, bad):
    class Inner(pl.LightningDataModule):
        stages = ()

        def setup(self, stage):
            self.stages = (*self.stages, stage)

        def train_dataloader(self):
            return DataLoader(Rows(bad), 32)

        def test_dataloader(self):
            return DataLoader(Rows(bad), 32)

    inner = Inner()
    data = FLEADataModule(inner, FLEA(permutations=0))
    module = Net()
    trainer = kit.trainer()
    trainer.fit(module, datamodule=data)
    assert module.seen == GOOD
    trainer.test(module, datamodule=data, verbose=False)
    assert inner.stages == ("fit", "test")
    pair = FLEADataModule(
        (TensorDataset(*map(torch.tensor, (bad.X, bad.y))), bad.source), FLEA(groups=bad.a, permutations=0)
    )
    assert len(pair.train_dataloader().dataset) == sum(s in GOOD for s in bad.source)
    with pytest.raises(PluginError, match="FLEADataModule: data is a list"):
        FLEADataModule([1, 2])
