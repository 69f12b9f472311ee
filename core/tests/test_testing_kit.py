"""The contract is green for plugins that keep it, and red, by the right name, for each way to break it."""

import os
import subprocess
import sys
import warnings
from fractions import Fraction

import lightning.pytorch as pl
import pytest
import torch
from core_plugins_to_check import Counting, Idle, LeavesAttribute, Own, Unmakeable, failures

from groundwire import Plugin, Plugins, hookimpl
from groundwire.testing import check_plugin
from groundwire.testing.contract import CHECKS, run_checks


@pytest.mark.ddp
def test_an_idle_plugin_passes_every_check():
    report = check_plugin(Idle, neutral=Idle)
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
    assert [outcome.name for outcome in report.outcomes] == list(CHECKS)


@pytest.mark.ddp
def test_a_sam_plugin_passes_every_check(kit):
    report = check_plugin(lambda: kit.SAM(rho=0.1), neutral=lambda: kit.SAM(rho=0))
    assert {outcome.status for outcome in report.outcomes} == {"passed"}


def test_sam_is_not_neutral(kit):
    assert "differs by" in failures(kit.SAM, "neutral_changes_nothing", neutral=kit.SAM)["neutral_changes_nothing"]


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


@pytest.mark.ddp
def test_a_plugin_that_needs_the_data_set_resumes_with_a_plain_loader():
    report, _ = run_checks(ChoosesRows, only=["resume_equals_uninterrupted", "ranks_agree_under_ddp"])
    assert [o.status for o in report.outcomes] == ["passed", "passed"]
    assert "at the end of an epoch" in report["resume_equals_uninterrupted"].reason


def test_the_pytest_plugin_imports_nothing_heavy():
    code = "import sys, groundwire.testing.fixtures; print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
