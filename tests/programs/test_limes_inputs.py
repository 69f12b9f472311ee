"""LIMES: times as pandas gives them, and state where nothing was trained."""

from datetime import UTC, datetime, timedelta, timezone

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from groundwire import Fields, PluginError, Plugins
from groundwire_limes import LIMES, StreamDataModule

START = datetime(2026, 3, 1, 7, 30, tzinfo=UTC)
TIMES = [START + timedelta(minutes=25 * i) for i in range(40)]
BERLIN = timezone(timedelta(hours=1))

WRONG = "item 22: only sequences of datetimes and arrays of numbers are read"


def pandas_index():
    return pd.DatetimeIndex(TIMES)


def local_index():
    return pd.DatetimeIndex(TIMES).tz_convert("Europe/Berlin")


def series():
    return pd.Series(TIMES)


def series_with_another_index():
    return pd.Series(TIMES, index=range(100, 140))


def objects():
    return np.array(TIMES, dtype=object)


def column_of_objects():
    return pd.Series(TIMES, dtype=object)


def mixed_zones():
    return pd.Series([t.astimezone(BERLIN) if i % 2 else t for i, t in enumerate(TIMES)], dtype=object)


FORMS = [pandas_index, local_index, series, series_with_another_index, objects, column_of_objects, mixed_zones]


def timestamps(kit, times):
    """What a stream of these times tells of its batches."""
    stream = StreamDataModule(kit.data(), times, batch_size=8)
    stream.setup("fit")
    return [batch[2]["timestamp"].tolist() for batch in stream.train_dataloader()]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.xfail(strict=True, reason=WRONG)
def test_a_stream_takes_them_as_it_takes_the_list(kit, form):
    assert timestamps(kit, form()) == timestamps(kit, TIMES)


class Timed(Dataset):
    """Rows that know their place."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return (*self.data[i], i)


def fields(batch):
    return Fields(batch[0], batch[1])


def scores_in_training(kit, time):
    """What the head gave for each batch, correction included."""

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.given = []

        def training_step(self, batch, batch_idx):
            scores = self(batch[0])
            self.given.append(scores.detach().clone())
            return torch.nn.functional.cross_entropy(scores, batch[1])

    module = Module()
    bundle = Plugins([LIMES(time=time)], report=False, fields=fields)
    kit.fit(module, bundle, loader=DataLoader(Timed(kit.data()), 4))
    return module.given


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.xfail(strict=True, reason=WRONG)
def test_so_does_the_callback(kit, form):
    times = form()

    def of_the_batch(batch):
        rows = batch[2].tolist()
        return times.iloc[rows] if isinstance(times, pd.Series) else times[rows]

    expected = scores_in_training(kit, lambda batch: [TIMES[i] for i in batch[2].tolist()])
    assert all(map(torch.equal, scores_in_training(kit, of_the_batch), expected))


@pytest.mark.parametrize("form", [pandas_index, series], ids=lambda form: form.__name__)
@pytest.mark.xfail(strict=True, reason="item 22: NaT is not named")
def test_a_missing_time_is_named(kit, form):
    times = form().to_series(index=range(40)) if form is pandas_index else form()
    times.iloc[3] = pd.NaT
    with pytest.raises((ValueError, PluginError), match="NaT"):
        timestamps(kit, pd.DatetimeIndex(times) if form is pandas_index else times)


AMONG = [*TIMES[:3], pd.NaT, *TIMES[4:]]


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(AMONG, id="list"),
        pytest.param(
            np.array(AMONG, dtype=object),
            id="array",
            marks=pytest.mark.xfail(strict=True, reason="item 22: NaT is not named"),
        ),
    ],
)
def test_so_is_one_among_objects(kit, times):
    with pytest.raises((ValueError, PluginError), match="NaT"):
        timestamps(kit, times)


def test_times_without_a_zone_are_refused(kit):
    with pytest.raises((ValueError, PluginError), match="time zone"):
        timestamps(kit, [t.replace(tzinfo=None) for t in TIMES])


@pytest.mark.parametrize("form", [pd.DatetimeIndex, pd.Series], ids=lambda form: form.__name__)
def test_so_are_those_of_pandas(kit, form):
    with pytest.raises((ValueError, PluginError), match="time zone"):
        timestamps(kit, form([t.replace(tzinfo=None) for t in TIMES]))


@pytest.mark.parametrize("options", [{}, {"head": "net.3"}, {"unlabelled": True}, {"preset": "icpr2022"}], ids=str)
@pytest.mark.parametrize("saved", ["at the end of the epoch", "after fit"])
def test_after_a_fit_that_lightning_skips_its_state_is_the_checkpoints(kit, saved, options):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    def fit(limes, *callbacks, **more):
        stream = StreamDataModule(kit.data(), [t.timestamp() for t in TIMES], batch_size=4)
        trainer = kit.trainer(Plugins([limes], report=False), *callbacks, enable_checkpointing=bool(callbacks))
        trainer.fit(Module(), datamodule=stream, **more)
        return trainer

    keeps = pl.callbacks.ModelCheckpoint(kit.path, filename="epoch")
    done = fit(LIMES(**options), keeps)
    path = kit.path / "epoch.ckpt"
    if saved == "after fit":
        path = kit.path / "fit.ckpt"
        done.save_checkpoint(path, weights_only=False)
    again = LIMES(**options)
    resumed = fit(again, keeps, ckpt_path=path)
    assert resumed.global_step == done.global_step
    expected = torch.load(path, weights_only=True)["callbacks"][again.state_key]
    assert plain(again.state_dict()) == plain(expected)
    resumed.save_checkpoint(kit.path / "again.ckpt", weights_only=False)
    assert plain(torch.load(kit.path / "again.ckpt", weights_only=True)["callbacks"][again.state_key]) == plain(
        expected
    )


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
