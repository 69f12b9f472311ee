"""The contract is green for plugins that keep it, and red, by the right name, for each way to break it."""

import os
import subprocess
import sys
import time
import warnings
from fractions import Fraction

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from groundwire import Plugin, Plugins, hookimpl
from groundwire.discovery import installed
from groundwire.testing import Classifier, StatefulLoader, check_plugin
from groundwire.testing.checks import distributed
from groundwire.testing.contract import CHECKS, run_checks
from groundwire.testing.loaders import Rows, plain_loader


class Idle(Plugin):
    """Does nothing."""


def failures(factory, *only, **options):
    report, errors = run_checks(factory, only=only or CHECKS, **options)
    assert len(errors) == len(report.failed)
    return {outcome.name: outcome.reason for outcome in report.failed}


def test_an_idle_plugin_passes_every_check():
    report = check_plugin(Idle, neutral=Idle)
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
    assert [outcome.name for outcome in report.outcomes] == list(CHECKS)


def test_a_sam_plugin_passes_every_check(kit):
    report = check_plugin(lambda: kit.SAM(rho=0.1), neutral=lambda: kit.SAM(rho=0))
    assert {outcome.status for outcome in report.outcomes} == {"passed"}


def test_sam_is_not_neutral(kit):
    assert "differs by" in failures(kit.SAM, "neutral_changes_nothing", neutral=kit.SAM)["neutral_changes_nothing"]


class LeavesAttribute(Plugin):
    def on_fit_start(self, trainer, pl_module):
        pl_module.leftover = 1


class LeavesHook(Plugin):
    def on_fit_start(self, trainer, pl_module):
        pl_module.net.register_forward_hook(lambda layer, arguments, output: None)


class LeavesGlobalHook(Plugin):
    def on_fit_start(self, trainer, pl_module):
        self.handle = torch.nn.modules.module.register_module_forward_hook(lambda layer, arguments, output: None)


class LeavesBuffer(Plugin):
    def on_fit_start(self, trainer, pl_module):
        pl_module.net.register_buffer("leftover", torch.zeros(1), persistent=False)


class LeavesWrapper(Plugin):
    """Changes training and forgets to undo it."""

    def on_fit_start(self, trainer, pl_module):
        original = pl_module.training_step
        pl_module.training_step = lambda batch, batch_idx: 2 * original(batch, batch_idx)


class LeavesStrategyWrapper(Plugin):
    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.leftover = trainer.strategy.backward


class LeavesOptimizerHook(Plugin):
    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        (LeavesAttribute, "attribute module.leftover was left"),
        (LeavesHook, "hook in module.net._forward_hooks was left"),
        (LeavesBuffer, "buffer module.net.leftover was left"),
        (LeavesWrapper, "attribute module.training_step was left"),
        (LeavesStrategyWrapper, "attribute trainer.strategy.leftover was left"),
        (LeavesOptimizerHook, "hook in trainer.optimizers[0]._optimizer_step_post_hooks was left"),
    ],
)
def test_what_a_plugin_leaves_behind_is_named(plugin, named):
    found = failures(plugin, "clean_after_fit", "clean_after_exception")
    assert found.keys() >= {"clean_after_fit"}
    assert named in found["clean_after_fit"]


def test_a_hook_left_on_all_modules_of_torch_is_named():
    plugin = LeavesGlobalHook()
    try:
        assert (
            "hook in torch._global_forward_hooks was left"
            in failures(lambda: plugin, "clean_after_fit")["clean_after_fit"]
        )
    finally:
        plugin.handle.remove()


class CleansAfterSuccessOnly(Plugin):
    """Lightning does not call ``teardown`` when a step raises."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.scratch = 1

    def teardown(self, trainer, pl_module, stage):
        del pl_module.scratch


def test_cleaning_up_in_teardown_alone_is_not_enough():
    found = failures(CleansAfterSuccessOnly, "clean_after_fit", "clean_after_exception")
    assert list(found) == ["clean_after_exception"]
    assert "after an exception in call 2 of training_step: attribute module.scratch" in found["clean_after_exception"]


class Swallows(Plugin):
    def on_fit_start(self, trainer, pl_module):
        original = pl_module.training_step

        def step(batch, batch_idx):
            try:
                return original(batch, batch_idx)
            except RuntimeError:
                return 0 * pl_module(batch[0]).sum()

        pl_module.training_step = step


def test_a_swallowed_exception_is_told():
    assert "did not reach" in failures(Swallows, "clean_after_exception")["clean_after_exception"]


class Perturbs(Plugin):
    """Moves the weights without ``step.perturbed()``, so nobody moves them back when the replay raises."""

    @hookimpl
    def gw_gradient(self, step):
        with torch.no_grad():
            for weight in step.parameters.values():
                weight.add_(1)
            second = step.replay()
            for weight in step.parameters.values():
                weight.sub_(1)
        return second


def test_weights_left_perturbed_by_an_exception_are_told():
    assert "net.0.weight differs by up to 1" in failures(Perturbs, "clean_after_exception")["clean_after_exception"]


class Counting(Plugin):
    """Scales gradients by a count of its own."""

    def __init__(self):
        self.count = 0

    @hookimpl
    def gw_gradient_edit(self, step):
        self.count += 1
        for grad in step.grads.values():
            grad.mul_(1 / self.count)


class Remembering(Counting):
    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


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


def test_global_randomness_makes_a_resume_differ_and_seeded_does_not():
    assert list(failures(UsesGlobalRandomness, "resume_equals_uninterrupted")) == ["resume_equals_uninterrupted"]
    assert failures(UsesSeededRandomness, "resume_equals_uninterrupted", "ranks_agree_under_ddp") == {}


class MovesTheGlobalStream(Plugin):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(1)


def test_a_draw_from_the_global_stream_is_not_neutral():
    checks = ("neutral_changes_nothing", "resume_equals_uninterrupted")
    assert list(failures(MovesTheGlobalStream, *checks, neutral=MovesTheGlobalStream)) == ["neutral_changes_nothing"]


class BoundHook(Plugin):
    """A bound method as a hook: a deep copy of the module copies the plugin."""

    def on_fit_start(self, trainer, pl_module):
        self.handle = pl_module.net.register_forward_hook(self.look)

    def look(self, layer, arguments, output):
        pass

    def on_fit_end(self, trainer, pl_module):
        self.handle.remove()


class BoundHookWithTrainer(BoundHook):
    """The copied plugin would bring the Trainer, which cannot be copied in the middle of a loop."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self.trainer = trainer


class HidesInClosure(Plugin):
    """A deep copy shares functions, so the copy's hook still reports to this plugin."""

    def on_validation_start(self, trainer, pl_module):
        self.handle = pl_module.net.register_forward_hook(lambda *_: print(self.name))

    def on_validation_end(self, trainer, pl_module):
        self.handle.remove()


class KeepsTrainer(Plugin):
    def teardown(self, trainer, pl_module, stage):
        pl_module.net.owner = trainer


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        (BoundHook, "a deep copy made in training holds a BoundHook"),
        (BoundHookWithTrainer, "a deep copy made in training fails"),
        (HidesInClosure, "a deep copy made in validation holds a HidesInClosure"),
        (KeepsTrainer, "a deep copy made after the run holds a Trainer"),
    ],
)
def test_what_a_deep_copy_takes_along_is_named(plugin, named):
    assert named in failures(plugin, "copies_hold_nothing")["copies_hold_nothing"]


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


@pytest.mark.parametrize(
    ("plugin", "named"), [(Diverges, "rank 0 against rank 1: "), (DiesOnOneRank, "ValueError: only here")]
)
def test_ranks_that_do_not_agree_are_named(plugin, named):
    assert named in failures(plugin, "ranks_agree_under_ddp")["ranks_agree_under_ddp"]


@pytest.mark.parametrize(
    ("patience", "named"), [(1, "Timed out"), (60, "the two processes were not done after 3 seconds")]
)
def test_a_rank_that_never_comes_ends_the_check(monkeypatch, patience, named):
    monkeypatch.setattr(distributed, "PATIENCE", patience)
    monkeypatch.setattr(distributed, "LIMIT", 3)
    assert named in failures(Sleeps, "ranks_agree_under_ddp")["ranks_agree_under_ddp"]


class AddsCallback(Plugin):
    def setup(self, trainer, pl_module, stage):
        trainer.callbacks.append(pl.Callback())


class KnowsItsPlace(Plugin):
    """Trains otherwise inside ``Plugins``."""

    @hookimpl
    def gw_gradient_edit(self, step, run):
        if any(isinstance(c, Plugins) for c in run.trainer.callbacks):
            step.grads["net.0.weight"].zero_()


def test_a_plugin_must_be_the_same_in_a_bundle_and_leave_the_list():
    found = failures(AddsCallback, "alone_equals_bundled")["alone_equals_bundled"]
    assert "trainer.callbacks was (AddsCallback) and is (AddsCallback, Callback) afterwards" in found
    assert "alone against inside Plugins: " in failures(KnowsItsPlace, "alone_equals_bundled")["alone_equals_bundled"]


class WantsModelInSetup(Plugin):
    def setup(self, trainer, pl_module, stage):
        if pl_module.net is None:
            raise ValueError("no model yet")


class WantsOnePackage(Plugin):
    def setup(self, trainer, pl_module, stage):
        if not isinstance(pl_module, pl.LightningModule):
            raise TypeError("not a LightningModule")


class ChangesInEvaluation(Plugin):
    def on_test_end(self, trainer, pl_module):
        with torch.no_grad():
            next(pl_module.parameters()).add_(1)


class FitsOnce(Plugin):
    used = False

    def on_fit_start(self, trainer, pl_module):
        if self.used:
            raise ValueError("used up")
        self.used = True


class KeepsFirstModule(Plugin):
    module = None

    def on_fit_start(self, trainer, pl_module):
        self.module = self.module or pl_module

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            next(self.module.parameters()).add_(1)


class Unmakeable(Plugin):
    def __init__(self, strength=1.0):
        self._function = lambda: strength


class Unreadable(Plugin):
    def state_dict(self):
        return {"owner": Fraction(1, 3)}


@pytest.mark.parametrize(
    ("plugin", "check", "named"),
    [
        (WantsModelInSetup, "late_built_model", "no model yet"),
        (WantsOnePackage, "both_lightning_packages", "not a LightningModule"),
        (ChangesInEvaluation, "evaluation_changes_nothing", "weights before and after test: net.0.weight differs"),
        (FitsOnce, "second_fit", "used up"),
        (FitsOnce, "one_object_in_two_trainers", "used up"),
        (KeepsFirstModule, "one_object_in_two_trainers", "first module before and after"),
        (Unmakeable, "arguments_round_trip", "argument 'strength' is not kept"),
        (Unreadable, "provenance_loads", "other than plain ones: fractions.Fraction"),
    ],
)
def test_each_other_check_can_fail(plugin, check, named):
    assert named in failures(plugin, check)[check]


class Deafened(Plugin):
    @hookimpl
    def gw_check(self, run):
        warnings.warn("a plugin's own warning", stacklevel=1)


def test_warnings_of_the_plugin_are_not_hidden():
    with pytest.warns(UserWarning, match="a plugin's own warning"):
        assert failures(Deafened, "second_fit") == {}


def test_all_failed_checks_are_listed_at_once():
    class Bad(LeavesAttribute):
        __init__ = Unmakeable.__init__

    keep = ("clean_after_fit", "arguments_round_trip")
    with pytest.raises(AssertionError, match=r"Bad: 0 passed, 0 not applicable, 12 skipped, 2 failed") as caught:
        check_plugin(Bad, skip={name: "not the point here" for name in CHECKS if name not in keep})
    assert all(f"FAILED          {name}: " in str(caught.value) for name in keep)
    assert len(caught.value.__cause__.exceptions) == 2


@pytest.mark.parametrize(
    ("skip", "named"),
    [
        ({"second_fitt": "why not"}, "did you mean 'second_fit'"),
        ([("second_fit", " ")], "gives no reason"),
        (["second_fit"], "gives no reasons"),
        ("second_fit", "gives no reasons"),
    ],
)
def test_a_skip_needs_a_known_check_and_a_reason(skip, named):
    with pytest.raises(ValueError, match=named):
        check_plugin(Idle, skip=skip)


class Own(Classifier):
    """A module with its own loaders, which draws randomly in a way that no resume can repeat."""

    def train_dataloader(self):
        return DataLoader(Rows(32), 8, shuffle=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * torch.rand(1).sum()

    def configure_gradient_clipping(self, *args, **kwargs):
        next(self.parameters()).grad.add_(torch.rand(1))


def test_what_does_not_apply_is_listed_as_such():
    report, _ = run_checks(Counting, module=Own, only=[c for c in CHECKS if c != "ranks_agree_under_ddp"])
    reasons = {o.name: o.reason for o in report.outcomes if o.status == "not applicable"}
    assert reasons.keys() == {
        "neutral_changes_nothing",
        "late_built_model",
        "both_lightning_packages",
        "resume_equals_uninterrupted",
    }
    assert reasons["resume_equals_uninterrupted"].endswith("without any plugin either")
    assert report.failed == ()


def test_without_the_standalone_package_its_check_does_not_apply(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report, _ = run_checks(Idle, only=["both_lightning_packages"])
    assert report["both_lightning_packages"].status == "not applicable"


class ChoosesRows(Plugin):
    @hookimpl
    def gw_train_data(self, data):
        data.keep(range(0, len(data.dataset), 2))


def test_a_plugin_that_needs_the_data_set_resumes_with_a_plain_loader():
    report, _ = run_checks(ChoosesRows, only=["resume_equals_uninterrupted", "ranks_agree_under_ddp"])
    assert [o.status for o in report.outcomes] == ["passed", "passed"]
    assert "at the end of an epoch" in report["resume_equals_uninterrupted"].reason


class Halves(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


class Parametrizes(Plugin):
    """Changes the model's structure for good, as a plugin of this kind must."""

    @hookimpl
    def gw_transform_model(self, module):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear) and not torch.nn.utils.parametrize.is_parametrized(layer):
                torch.nn.utils.parametrize.register_parametrization(layer, "weight", Halves())


def test_a_change_of_structure_may_stay():
    report = check_plugin(Parametrizes)
    assert {o.status for o in report.outcomes if o.name != "neutral_changes_nothing"} == {"passed"}


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


def test_the_pytest_plugin_imports_nothing_heavy():
    code = "import sys, groundwire.testing.fixtures; print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
