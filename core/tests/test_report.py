"""A report keeps one finding per key, survives the disk, and never leaves half a file."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_report_values import finding, same, values
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from groundwire.records import Section, Table
from groundwire.services.report.report import SCHEMA_VERSION, Report


def test_a_later_finding_replaces_the_one_with_its_key():
    report = Report()
    report.add([finding(1, epoch=0), finding(5, epoch=1)])
    report.add([finding(2, severity="fail", epoch=0)])
    assert [(f.value, f.severity, f.epoch) for f in report.findings] == [(2, "fail", 0), (5, "info", 1)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([None, "test"]), st.sampled_from([None, 0, 1]))))
def test_there_is_one_finding_for_each_key_and_it_is_the_last(places):
    report = Report()
    for value, (plugin, stage, epoch) in enumerate(places):
        report.add([finding(value, plugin=plugin, stage=stage, epoch=epoch)])
    last = {place: value for value, place in enumerate(places)}
    assert {(f.plugin, f.stage, f.epoch): f.value for f in report.findings} == last


def test_an_epoch_given_as_a_tensor_is_the_same_key():
    report = Report()
    report.add([finding(1, epoch=3), finding(2, epoch=torch.tensor(3))])
    assert [f.value for f in report.findings] == [2]


@given(value=values, text=st.text(), epoch=st.none() | st.integers())
def test_a_report_survives_the_disk(tmp_path_factory, value, text, epoch):
    folder = tmp_path_factory.mktemp("run")
    report = Report({"module": text, "limit": math.inf})
    report.add([finding(value, plugin=text, message=text, stage="test", epoch=epoch)])
    report.write(folder, [("cram", Section(text, text, [Table(text, [text], [[math.nan], [text]])]))])
    back = Report.read(folder)
    assert same(back.findings, report.findings)
    assert same(back.sections, report.sections)
    assert back.meta == report.meta
    assert back.path == report.path == folder / "report.html"


def test_a_lone_surrogate_does_not_cost_the_report(tmp_path):
    report = Report()
    report.add([finding("\ud800", message="\udfff")])
    report.write(tmp_path)
    assert Report.read(tmp_path).findings[0].value == "\ud800"
    assert report.path.is_file()


@pytest.mark.parametrize("below", ["", "groundwire", "groundwire/findings.json"])
def test_read_takes_the_run_its_folder_or_the_file(tmp_path, below):
    report = Report()
    report.add([finding()])
    report.write(tmp_path / "groundwire")
    assert Report.read(tmp_path / below).findings == report.findings
    assert Report.read(str(tmp_path / below)).path == tmp_path / "groundwire" / "report.html"


def test_times_are_utc_and_updated_moves(tmp_path):
    report = Report({"created": "2020-01-01T00:00:00Z", "updated": "2020-01-01T00:00:00Z"})
    report.write(tmp_path)
    meta = Report.read(tmp_path).meta
    assert meta["created"] == "2020-01-01T00:00:00Z"
    assert meta["updated"] > "2026"
    assert meta["updated"].endswith("Z")


def test_sections_of_other_plugins_are_kept_and_own_ones_replaced(tmp_path):
    Report().write(tmp_path, [("cram", Section("Old")), ("limes", Section("Prior", figures=[Figure()]))])
    report = Report.read(tmp_path)
    report.write(tmp_path, [("cram", Section("New"))])
    assert [(plugin, part.title) for plugin, part in Report.read(tmp_path).sections] == [
        ("limes", "Prior"),
        ("cram", "New"),
    ]


def test_a_table_cell_that_is_not_plain_is_refused_and_the_old_files_stay(tmp_path):
    Report().write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="section 'Sizes' of cram cannot be stored: object"):
        Report().write(tmp_path, [("cram", Section("Sizes", tables=[Table("", ["a"], [[object()]])]))])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    report = Report()
    report.add([finding("first")])
    report.write(tmp_path)

    def fail(source, target):
        assert Path(source).parent == Path(target).parent
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    report.add([finding("second")])
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path)
    assert Report.read(tmp_path).findings[0].value == "first"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["findings.json", "report.html"]


def test_others_may_read_the_files_as_the_umask_says(tmp_path):
    (tmp_path / "plain").write_text("")
    Report().write(tmp_path)
    assert (tmp_path / "findings.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_missing_report_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Report.read(tmp_path)
    assert str(tmp_path / "findings.json") in str(caught.value)
    assert str(tmp_path / "groundwire" / "findings.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema": 1, "meta"', "is damaged, it is not JSON"),
        ("\0\xff", "is damaged, it is not JSON"),
        ("[]", "not a report of groundwire"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 1, "meta": {}, "findings": [{}], "sections": []}', "is damaged"),
        ('{"schema": 1, "meta": {}, "findings": {"a": 1}, "sections": []}', "is damaged"),
        (f'{{"schema": {SCHEMA_VERSION + 1}}}', "schema 2.*reads up to 1: pip install --upgrade groundwire"),
    ],
)
def test_a_file_that_cannot_be_understood_says_so(tmp_path, content, words):
    (tmp_path / "findings.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=words) as caught:
        Report.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_reading_a_report_does_not_import_torch(tmp_path):
    Report().write(tmp_path)
    code = "import sys; from groundwire import Report; Report.read(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
