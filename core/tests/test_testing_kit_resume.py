"""State, randomness and ranks: the contract compares a run with its pieces and processes with each other."""

import time

import pytest
import torch
from core_plugins_to_check import Counting, Remembering, failures

from groundwire import Plugin, hookimpl
from groundwire.testing.checks import distributed


def test_state_that_is_not_saved_makes_a_resume_differ():
    assert (
        "resumed against uninterrupted: "
        in failures(Counting, "resume_equals_uninterrupted")["resume_equals_uninterrupted"]
    )
    assert failures(Remembering, "resume_equals_uninterrupted") == {}


class UsesGlobalRandomness(Plugin):
    @hookimpl
    def gw_gradient_edit(self, step):
        for grad in step.grads.values():
            grad.add_(torch.rand_like(grad), alpha=0.1)


class UsesSeededRandomness(Plugin):
    @hookimpl
    def gw_gradient_edit(self, step, run):
        generator = torch.Generator().manual_seed(run.step_seed)
        for grad in step.grads.values():
            grad.add_(torch.rand(grad.shape, generator=generator), alpha=0.1)


@pytest.mark.ddp
def test_global_randomness_makes_a_resume_differ_and_seeded_does_not():
    assert list(failures(UsesGlobalRandomness, "resume_equals_uninterrupted")) == ["resume_equals_uninterrupted"]
    assert failures(UsesSeededRandomness, "resume_equals_uninterrupted", "ranks_agree_under_ddp") == {}


class MovesTheGlobalStream(Plugin):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(1)


def test_a_draw_from_the_global_stream_is_not_neutral():
    checks = ("neutral_changes_nothing", "resume_equals_uninterrupted")
    assert list(failures(MovesTheGlobalStream, *checks, neutral=MovesTheGlobalStream)) == ["neutral_changes_nothing"]


class Diverges(Plugin):
    @hookimpl
    def gw_gradient_edit(self, step, run):
        for grad in step.grads.values():
            grad.mul_(1 + run.trainer.global_rank)


class DiesOnOneRank(Plugin):
    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            raise ValueError("only here")


class Sleeps(Plugin):
    """One rank never comes to the next collective operation."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 0:
            time.sleep(1000)


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("plugin", "named"), [(Diverges, "rank 0 against rank 1: "), (DiesOnOneRank, "ValueError: only here")]
)
def test_ranks_that_do_not_agree_are_named(plugin, named):
    assert named in failures(plugin, "ranks_agree_under_ddp")["ranks_agree_under_ddp"]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("patience", "named"), [(1, "Timed out"), (60, "the two processes were not done after 3 seconds")]
)
def test_a_rank_that_never_comes_ends_the_check(monkeypatch, patience, named):
    monkeypatch.setattr(distributed, "PATIENCE", patience)
    monkeypatch.setattr(distributed, "LIMIT", 3)
    assert named in failures(Sleeps, "ranks_agree_under_ddp")["ranks_agree_under_ddp"]
