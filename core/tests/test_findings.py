"""What is written at the end, and where."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from groundwire import Finding, Plugin, Plugins, Report, Section, Table, hookimpl


class Finds(Plugin):
    name = "finds"

    def __init__(self):
        self.reports = []

    @hookimpl
    def gw_findings(self, run):
        number = len(run.findings)
        return [
            Finding("finds", "count", "info", number, f"{number} so far."),
            Finding("finds", "word", "warn", "x", "A word."),
        ]

    @hookimpl
    def gw_section(self, findings):
        return Section("Finds", f"{len(findings)} findings.", [Table("All", ("code",), [(f.code,) for f in findings])])

    @hookimpl
    def gw_report(self, report, run):
        assert run.stage in ("train", "test", "validate")
        self.reports.append(len(report.findings))


def test_findings_of_fit_and_test_meet_in_the_log_folder(kit):
    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    module, plugin = kit.Net(), Finds()
    trainer = kit.fit(module, plugin, val=kit.loader(), logger=logger, max_epochs=2)
    trainer.test(module, kit.loader(), verbose=False)
    report = Report.read(kit.path)
    assert report.path == kit.path / "groundwire" / "report.html"
    found = {(f.code, f.stage, f.epoch) for f in report.findings}
    assert found == {
        (code, stage, epoch)
        for code in ("count", "word")
        for stage, epoch in (("validate", 0), ("validate", 1), ("train", None), ("test", None))
    }
    assert plugin.reports == [6, 8]
    assert "Finds" in report.path.read_text()
    assert json.loads((kit.path / "groundwire" / "findings.json").read_text())
    assert "finds/count" in (kit.path / "metrics.csv").read_text()
    assert "finds/word" not in (kit.path / "metrics.csv").read_text()


def test_without_a_log_folder_all_runs_of_a_trainer_share_one(kit):
    module = kit.Net()
    trainer = kit.fit(module, Finds())
    trainer.test(module, kit.loader(), verbose=False)
    [folder] = (kit.path / "groundwire").iterdir()
    assert {f.stage for f in Report.read(folder).findings} == {"train", "test"}


@pytest.mark.parametrize("case", ["fast_dev_run", "report_off", "nothing_found"])
def test_nothing_is_written(kit, case):
    plugin = Plugin() if case == "nothing_found" else Finds()
    callback = Plugins([plugin], report=case != "report_off")
    kit.fit(kit.Net(), callback, **({"fast_dev_run": True} if case == "fast_dev_run" else {}))
    assert not (kit.path / "groundwire").exists()


def test_the_folder_can_be_chosen(kit):
    kit.fit(kit.Net(), Plugins([Finds()], report_dir=kit.path / "here"))
    assert (kit.path / "here" / "report.html").exists()


def test_a_crash_writes_no_report_but_loses_no_exception(kit):
    class Breaks(Finds):
        @hookimpl
        def gw_section(self, findings):
            raise RuntimeError("cannot draw")

    with pytest.raises(RuntimeError, match="cannot draw"):
        kit.fit(kit.Net(), Breaks())


def test_two_trainers_never_share_a_folder(kit):
    for _ in range(3):
        kit.fit(kit.Net(), Finds())
    assert len(list((kit.path / "groundwire").iterdir())) == 3


def test_an_unreadable_older_report_is_moved_aside(kit):
    here = kit.path / "here"
    here.mkdir()
    (here / "findings.json").write_text("{")
    with pytest.warns(UserWarning, match="is damaged.*a new one is written"):
        kit.fit(kit.Net(), Plugins([Finds()], report_dir=here))
    assert Report.read(here).findings
    assert (here / "findings.unreadable.json").exists()


def test_a_folder_that_cannot_be_written_costs_the_report_only(kit):
    (kit.path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="the report cannot be written"):
        trainer = kit.fit(kit.Net(), Plugins([Finds()], report_dir=kit.path / "file" / "below"))
    assert trainer.state.finished


@pytest.mark.parametrize("number", [torch.tensor(0.25), np.float32(0.25), np.array(0.25)])
def test_a_number_from_torch_or_numpy_is_logged_as_any_number(kit, number):
    class Finds(Plugin):
        name = "finds"

        @hookimpl
        def gw_findings(self, run):
            return [Finding("finds", "share", "info", number, "A quarter.")] if run.stage == "validate" else None

    trainer = kit.fit(kit.Net(), Finds(), val=kit.loader())
    assert trainer.callback_metrics["finds/share"] == 0.25


def test_a_value_that_cannot_be_stored_is_told_at_the_first_validation(kit):
    class Finds(Plugin):
        @hookimpl
        def gw_findings(self, run):
            return [Finding("finds", "rows", "info", {1, 2}, "A set.")]

    module = kit.Net()
    with pytest.raises(TypeError, match="finding 'rows' of finds cannot be stored"):
        kit.fit(module, Finds(), val=kit.loader(), max_epochs=2)
    assert module.trainer.current_epoch == 0


def test_numbers_of_one_of_several_loaders_can_be_monitored(kit):
    class Finds(Plugin):
        name = "finds"

        @hookimpl
        def gw_findings(self, run):
            return [Finding("finds", "acc/dataloader_idx_1@0.9", "info", 0.5, "Half.")]

    class Module(kit.Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("acc", 1.0)

    best = pl.callbacks.ModelCheckpoint(kit.path, monitor="finds/acc/dataloader_idx_1@0.9")
    trainer = kit.fit(Module(), Finds(), best, val=[kit.loader(), kit.loader()], enable_checkpointing=True)
    assert trainer.callback_metrics["finds/acc/dataloader_idx_1@0.9"] == 0.5
    assert best.best_model_score == 0.5
