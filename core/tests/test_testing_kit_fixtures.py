"""The fixtures and the loader that authors get from groundwire.testing."""

import lightning.pytorch as pl
import pytest
import torch
from core_plugins_to_check import Counting, Idle, Own, Remembering

from groundwire.discovery import installed
from groundwire.testing import StatefulLoader
from groundwire.testing.loaders import plain_loader


def test_the_stateful_loader_shuffles_each_epoch_anew_and_goes_on_where_it_was():
    def rows(loader):
        return [batch.tolist() for batch in loader]

    loader = StatefulLoader(range(10), batch_size=3)
    first, second = rows(loader), rows(loader)
    assert first != second
    assert sorted(row for batch in first for row in batch) == list(range(10))
    other = StatefulLoader(range(10), batch_size=3)
    other.load_state_dict({"epoch": 0, "batch": 2})
    assert rows(other) == first[2:]
    assert rows(other) == second
    other.load_state_dict({"epoch": 0, "batch": 4})
    assert rows(other) == second


def test_gw_fit_trains_in_its_own_folder(gw_fit, tmp_path):
    done = gw_fit(Idle(), limit_train_batches=2)
    assert done.trainer.global_step == 4
    assert done.logged.keys() >= {"train_loss", "val_loss", "val_accuracy"}
    assert done.directory == tmp_path
    assert gw_fit(module=Own(), max_epochs=1).trainer.global_step == 4


def test_gw_fit_ends_in_the_same_place_each_time_and_leaves_the_random_state(gw_fit):
    before = torch.get_rng_state()
    one, other = gw_fit(), gw_fit(Idle())
    assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_installed_is_seen_in_a_test_with_the_fixtures(gw_fit):
    assert installed() == ()
    path = gw_fit(Idle()).directory / "model.ckpt"
    gw_fit(Idle()).trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["groundwire"]["plugins"][0]["dist"] is None


def test_gw_resume_compares_two_pieces_with_one(gw_resume):
    assert gw_resume(list).differences == []
    assert gw_resume(Remembering, stop_after=7, accumulate_grad_batches=1).differences == []
    assert gw_resume(lambda: [Counting(), pl.Callback()]).differences != []


def test_gw_resume_needs_a_step_to_stop_after(gw_resume):
    with pytest.raises(ValueError, match="over before stop_after=99"):
        gw_resume(list, stop_after=99)


def test_lightning_alone_does_not_resume_in_mid_epoch_with_a_plain_loader(gw_resume):
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        assert gw_resume(list, loader=lambda module: plain_loader()).differences != []
