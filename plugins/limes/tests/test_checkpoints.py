"""Going on where a run was saved."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from limes_digit_stream import HOUR, Digits, Spy, across_hours, module_of, stream
from torch.utils.data import DataLoader

from groundwire import PluginError
from groundwire_limes import LIMES, StreamDataModule

RESUMED = (1, 6, 7, 23)


class SaveAll(pl.Callback):
    """A checkpoint after each of the batches to resume at."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 in RESUMED:
            trainer.save_checkpoint(self.folder / f"{batch_idx + 1}.ckpt")


@pytest.fixture(scope="module", params=[{}, {"preset": "icpr2022"}], ids=["auto", "icpr2022"])
def whole(request, tmp_path_factory):
    """A run that was not interrupted, and what it saved on its way."""
    folder, spy, module = tmp_path_factory.mktemp("whole"), Spy(), Digits()
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                         callbacks=[LIMES(season="4h", **request.param), spy, SaveAll(folder)])  # fmt: skip
    trainer.fit(module, datamodule=module_of())
    return SimpleNamespace(options=request.param, offsets=spy.offsets, weights=module.state_dict(), folder=folder)


@pytest.mark.parametrize("at", RESUMED)
def test_a_run_resumed_at_any_batch_has_bitwise_the_same_offsets(kit, whole, at):
    rest, module = Spy(), Digits()
    trainer = kit.trainer(LIMES(season="4h", **whole.options), rest, report=True)
    trainer.fit(module, datamodule=module_of(), ckpt_path=whole.folder / f"{at}.ckpt")
    assert len(rest.offsets) == len(whole.offsets) - at == 24 - at
    assert all(torch.equal(a, b) for a, b in zip(whole.offsets[at:], rest.offsets, strict=True))
    assert kit.difference(module.state_dict(), whole.weights) == 0.0


def out_of_step(late):
    """A stream whose batches span two hours each; or hours in order, with a few batches that come later."""
    datamodule = module_of()
    if not late:
        return across_hours(datamodule)
    batches = datamodule.batches()
    for now, later in ((4, 9), (7, 11), (12, 16)):
        batches.insert(later, batches.pop(now))
    datamodule.batches = lambda: batches
    return datamodule


@pytest.mark.parametrize("late", [False, True], ids=["mixed", "late"])
def test_saving_and_validating_change_no_offset_of_training_and_neither_does_resuming(kit, late):
    def run(*callbacks, **options):
        spy, datamodule = Spy(), out_of_step(late)
        limes = LIMES(season="4h", lateness=3 * late)
        kit.trainer(limes, spy, *callbacks, num_sanity_val_steps=0, **options).fit(
            Digits(), datamodule.train_dataloader(), DataLoader(stream()[0], 200), ckpt_path=resumed
        )
        return limes, spy.offsets

    resumed = None
    limes, offsets = run(limit_val_batches=0)
    saved = run(SaveAll(kit.path), val_check_interval=3)
    for at in RESUMED:
        resumed = kit.path / f"{at}.ckpt"
        rest = run(val_check_interval=3)
        assert rest[0].extrapolator.state_dict() == limes.extrapolator.state_dict()
        assert rest[0]._tracker.finished == saved[0]._tracker.finished == limes._tracker.finished
        for found, expected in ((saved[1], offsets), (rest[1], offsets[at:])):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_checkpoint_within_a_step_knows_the_labels_of_that_step(kit):
    limes, datamodule = LIMES(), module_of()
    kit.trainer(limes, SaveAll(kit.path)).fit(Digits(), datamodule=datamodule)
    loaded = LIMES()
    loaded.load_state_dict(torch.load(kit.path / "7.ckpt", weights_only=True)["callbacks"]["LIMES"])
    labels = [batch[1].numpy() for batch in datamodule.train_dataloader()]
    assert loaded.extrapolator.observed == loaded.next_step == 4
    assert loaded.extrapolator.state_dict()["counts"][3] == np.bincount(labels[6], minlength=10).tolist()
    limes.load_state_dict(loaded.state_dict())
    assert np.array_equal(loaded.prior(), limes.prior())


def test_a_checkpoint_brings_its_history_along_for_prediction(kit, fitted):
    data, _ = stream()
    expected = kit.trainer(fitted.limes).predict(fitted.module, DataLoader(data, 50))
    found = kit.trainer(LIMES(), report=True).predict(Digits(), DataLoader(data, 50), ckpt_path=fitted.checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_without_history_the_user_is_told(kit, caplog):
    data, _ = stream()
    kit.trainer(LIMES()).predict(Digits(), DataLoader(data, 50))
    assert "LIMES has no history" in caplog.text


@pytest.mark.parametrize("options", [{"method": "nearest"}, {"period": "2h"}, {"batches_per_step": 3}])
def test_a_checkpoint_of_other_arguments_is_refused_with_the_differences(kit, fitted, options):
    with pytest.raises(PluginError, match=f"{next(iter(options))}: .* in the checkpoint, .* here"):
        kit.trainer(LIMES(**options)).fit(Digits(), datamodule=module_of(), ckpt_path=fitted.checkpoint)


def test_a_head_with_another_number_of_classes_than_the_history_is_refused(kit, fitted):
    data, _ = stream()
    with pytest.raises(PluginError, match=r"has 10 classes and the head 'net\.2' has 12"):
        kit.trainer(copy.deepcopy(fitted.limes)).predict(Digits(12), DataLoader(data, 50))


def test_a_second_fit_of_the_module_goes_on_and_another_module_starts_anew(kit):
    data, times = stream(24)
    first, second = (
        StreamDataModule(torch.utils.data.Subset(data, rows), times[rows], batch_size=20)
        for rows in (np.flatnonzero(times < 12 * HOUR), np.flatnonzero(times >= 12 * HOUR))
    )
    limes, module = LIMES(), Digits()
    kit.trainer(limes).fit(module, datamodule=first)
    kit.trainer(limes).fit(module, datamodule=second)
    assert limes.extrapolator.observed == 24
    kit.trainer(limes).fit(Digits(), datamodule=first)
    assert limes.extrapolator.observed == 12
