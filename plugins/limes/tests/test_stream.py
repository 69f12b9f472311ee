"""StreamDataModule: batches, workers, processes, a resume."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy
from limes_digit_stream import Digits, labels_by_hour, module_of, stream
from torch.utils.data import TensorDataset

from groundwire_limes import LIMES, StreamDataModule
from groundwire_limes.datamodule import portions


class Rows:
    """Rows as dicts."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return dict(zip(("image", "label"), self.data[i], strict=True))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_processes_share_all_rows_in_equally_many_batches_none_of_them_empty(rows, size, ranks):
    parts = portions(np.arange(rows), size, ranks)
    by_rank = [[part[rank::ranks] for part in parts] for rank in range(ranks)]
    assert all(len(part) for batches in by_rank for part in batches)
    assert max(len(part) for batches in by_rank for part in batches) <= size + 1
    seen = np.concatenate(parts)
    assert seen[:rows].tolist() == list(range(rows))
    assert len(seen) == max(rows, ranks)


@pytest.mark.ddp
def test_two_processes_count_each_row_once(kit):
    class Kept(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(limes.extrapolator.state_dict(), kit.path / f"rank{trainer.global_rank}.pt")

    limes = LIMES()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    kit.trainer(limes, Kept(), strategy=strategy, devices=2).fit(Digits(), datamodule=module_of(batch_size=15))
    one, two = (torch.load(kit.path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == two
    assert one["counts"] == [row.tolist() for row in labels_by_hour(module_of()).values()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_and_the_place_after_it_are_the_same_with_workers(workers):
    data, times = stream(3)
    loader = StreamDataModule(data, times, batch_size=15, num_workers=workers).train_dataloader()
    expected = StreamDataModule(data, times, batch_size=15).train_dataloader()
    for number, (batch, other) in enumerate(zip(loader, expected, strict=True)):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[2]["timestamp"], other[2]["timestamp"])
        assert loader.state_dict() == {"next": number + 1}
    loader.load_state_dict({"next": 7})
    assert torch.equal(torch.cat([batch[1] for batch in loader]), data.tensors[1][40 * 2 + 15 :])


def test_rows_may_be_dicts_and_labels_shares(kit):
    data, times = stream(4)
    limes = LIMES(training_prior="realised")

    class Module(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    kit.trainer(limes).fit(Module(), datamodule=StreamDataModule(Rows(data), times, batch_size=20))
    expected = np.bincount(data.tensors[1][:40].numpy(), minlength=10).tolist()
    assert limes.extrapolator.state_dict()["counts"][0] == expected
    shares = torch.nn.functional.one_hot(data.tensors[1], 10).double()
    soft = StreamDataModule(TensorDataset(data.tensors[0], shares), times, batch_size=7)
    assert (
        soft.step_counts(0, 10).tolist() == StreamDataModule(Rows(data), times).step_counts(0, 10).tolist() == expected
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0"),
    ],
)
def test_bad_arguments_of_a_stream_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        StreamDataModule([(0, 0)], [0], **options)


def test_rows_that_cannot_carry_their_time_are_refused():
    with pytest.raises(ValueError, match="a batch of the data set is a Tensor"):
        next(iter(StreamDataModule([1.0, 2.0], [0, 0]).train_dataloader()))
