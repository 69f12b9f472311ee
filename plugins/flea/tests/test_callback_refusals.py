"""Refusals of the callback before anything is trained."""

import time

import numpy as np
import pytest
import torch
from flea_clinics_of_tests import Net, Rows, fit
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from groundwire import PluginError, hookimpl
from groundwire_flea import FLEA

pytestmark = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def no(text, kit, dataset, flea, **options):
    module = Net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(PluginError, match=text):
        fit(kit, dataset, flea, module, **options)
    assert kit.difference(before, module.state_dict()) == 0


def test_what_cannot_be_used_is_refused_before_training(kit, bad, table):
    data = Rows(bad)
    no(
        "groups is not in the training batches",
        kit,
        TensorDataset(*map(torch.tensor, (bad.X, bad.y))),
        FLEA(source=bad.source),
    )
    no("source='hospital' is not in the training batches", kit, data, FLEA(source="hospital"))
    no("source has 3 values, but the data set has 569 rows", kit, data, FLEA(source=["a", "b", "c"]))
    no("at least 3", kit, Rows(table(2)), FLEA())
    no("n_clean=9 is outside 1..5", kit, data, FLEA(n_clean=9))
    no("Endless cannot be read by number", kit, DataLoader(Endless(), 4), FLEA())
    no("embed='backbone' is no part of Net -> its children are: encoder, net", kit, data, FLEA(embed="backbone"))
    no(
        "cannot be chosen",
        kit,
        DataLoader(data, 32, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 569, 569)),
        FLEA(),
    )
    no("batch_size=None does not say what one row of", kit, DataLoader(data, batch_size=None), FLEA())
    no("a batch became one number", kit, data, FLEA(embed=lambda x: x.mean()))
    no("features of 569 rows have missing", kit, data, FLEA(embed=lambda x: x.new_full((len(x), 40), np.nan)))
    lonely = type(bad)(**vars(bad) | {"a": np.where(bad.source == "clinic 2", 0, bad.a)})
    no("source 'clinic 2' .* has no row of group 1", kit, Rows(lonely), FLEA())


def test_several_loaders_are_refused_with_the_way_out(kit, bad):
    module = Net()
    with pytest.raises(PluginError, match="SourceDatasets"):
        kit.trainer(FLEA()).fit(module, {"a": DataLoader(Rows(bad), 8), "b": DataLoader(Rows(bad), 8)})


def wait(path, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.ddp
def test_what_the_data_set_raises_reaches_every_rank(kit, bad):
    class Broken(Rows):
        def __getitem__(self, i):
            raise KeyError("scan 7")

    class Telling(FLEA):
        name = "flea"

        @hookimpl
        def gw_train_data(self, data, run):
            try:
                super().gw_train_data(data, run)
            except Exception as error:
                (kit.path / f"rank{run.trainer.global_rank}.txt").write_text(repr(error))
                wait(kit.path / "rank1.txt")  # all processes are ended when one fails
                raise

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    with pytest.raises(ProcessRaisedException):
        fit(kit, Broken(bad), Telling(permutations=0), strategy=strategy, devices=2)
    assert (kit.path / "rank0.txt").read_text() == "KeyError('scan 7')"
    assert "flea: rank 0 failed: KeyError: 'scan 7'" in (kit.path / "rank1.txt").read_text()


@pytest.mark.parametrize("options", [{"fairness": "x"}, {"mode": "x"}, {"n_clean": 0}, {"n_clean": 2.0}])
def test_arguments_are_checked_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FLEA(**options)
