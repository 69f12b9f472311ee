"""The decision is made once: at a resume, at a reload of the loaders, and for another fit."""

import warnings

import pytest
import torch
from flea_clinics_of_tests import GOOD, Net, Rows, fit
from torch.utils.data import DataLoader

from groundwire import PluginError
from groundwire.services.checkpoint.provenance import plugins_in
from groundwire_flea import FLEA, FLEAWarning
from groundwire_flea.result import SavedResult

pytestmark = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


class Counting(FLEA):
    """Counts the comparisons."""

    name = "flea"
    compared = 0

    @property
    def loader_filter(self):
        loader_filter = super().loader_filter

        class Counted(type(loader_filter)):
            def _compare(this, *arguments):
                Counting.compared += 1
                return super()._compare(*arguments)

        return Counted(**vars(loader_filter))


def test_a_resumed_run_neither_compares_again_nor_changes_the_data(kit, bad):
    Counting.compared = 0
    path, first = kit.path / "resume.ckpt", Counting(permutations=0)
    trainer, _ = fit(kit, Rows(bad), first)
    trainer.save_checkpoint(path)
    second = Counting(n_clean=5, permutations=0)  # would keep everything
    module = Net()
    with pytest.warns(FLEAWarning, match="n_clean now means 5 sources, but the decision was made for 3 and stays"):
        kit.trainer(second, max_epochs=2).fit(
            module, DataLoader(Rows(bad), 32, shuffle=True), ckpt_path=path, weights_only=True
        )
    assert Counting.compared == 1
    assert module.seen == GOOD
    assert second.decision == first.decision
    facts = plugins_in(torch.load(path, weights_only=True))[0]["facts"]
    assert set(facts["kept"]) == GOOD
    assert facts["sources"] == first.decision.hash


def test_a_resume_with_an_unseen_source_is_refused_and_with_other_rows_warned_about(kit, bad, table):
    path = kit.path / "resume.ckpt"
    trainer, _ = fit(kit, Rows(bad), FLEA(permutations=0))
    trainer.save_checkpoint(path)
    more = table(6, (1, 3))
    with pytest.raises(PluginError, match="'clinic 5'; it knows 'clinic 0'"):
        kit.trainer(FLEA(), max_epochs=2).fit(Net(), DataLoader(Rows(more), 32), ckpt_path=path, weights_only=True)
    fewer = type(bad)(**{k: v[:400] for k, v in vars(bad).items()})
    module = Net()
    with pytest.warns(FLEAWarning, match="not those of the checkpoint's decision"):
        kit.trainer(FLEA(), max_epochs=2).fit(module, DataLoader(Rows(fewer), 32), ckpt_path=path, weights_only=True)
    assert module.seen == GOOD


def test_a_resume_with_other_arguments_is_told_that_the_decision_stays(kit, bad):
    path, first = kit.path / "resume.ckpt", FLEA(always_keep=["clinic 0"], permutations=0)
    trainer, _ = fit(kit, Rows(bad), first)
    trainer.save_checkpoint(path)
    others = {"fairness": "equalized_odds", "append_sensitive": False, "count_copies_once": True, "always_keep": ()}
    resumed = {}
    for arguments in (others, {"always_keep": ["clinic 0"]}):
        flea, module = FLEA(permutations=0, **arguments), Net()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FLEAWarning)
            kit.trainer(flea, max_epochs=2).fit(module, DataLoader(Rows(bad), 32), ckpt_path=path, weights_only=True)
        assert module.seen == GOOD
        assert flea.decision == first.decision
        resumed[len(arguments)] = [str(w.message) for w in caught if w.category is FLEAWarning]
    assert len(resumed[4]) == 4
    for name in others:
        assert any(f"flea: {name} is " in text and "and stays" in text for text in resumed[4]), name
    assert resumed[1] == []


def test_a_decision_of_an_earlier_release_is_read(kit, bad):
    """It does not say with which arguments it was made, and knows no copies."""
    path, first = kit.path / "resume.ckpt", FLEA(permutations=0)
    trainer, _ = fit(kit, Rows(bad), first)
    state = {k: v for k, v in first.decision.state().items() if k not in ("options", "copies")}
    assert SavedResult.from_state(state).kept == first.decision.kept
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    for callback in checkpoint["callbacks"].values():
        if "decision" in callback:
            callback["decision"] = state
    torch.save(checkpoint, path)
    module = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FLEAWarning)
        flea = FLEA(fairness="equalized_odds", permutations=0)
        kit.trainer(flea, max_epochs=2).fit(module, DataLoader(Rows(bad), 32), ckpt_path=path, weights_only=True)
    assert module.seen == GOOD


def test_another_fit_decides_anew(kit, bad, table):
    flea = FLEA(permutations=0)
    fit(kit, Rows(bad), flea)
    fit(kit, Rows(table(5, (0, 4))), flea)
    assert flea.decision.named(False) == ["clinic 0", "clinic 4"]


def test_reloading_loaders_every_epoch_compares_once(kit, bad):
    Counting.compared = 0
    fit(kit, Rows(bad), Counting(permutations=0), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert Counting.compared == 1
