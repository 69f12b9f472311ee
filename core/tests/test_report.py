"""A report survives the disk, keeps one finding per key, never leaves half a file, and is safe to open."""

import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from groundwire.report import SCHEMA_VERSION, Report
from groundwire.report.display import is_numeric, show, show_column
from groundwire.report.figures import svg
from groundwire.report.page import columns, render
from groundwire.report.plain import dumps, loads, plain
from groundwire.types import Finding, Section, Table

HOSTILE = "<script>alert(1)</script>\"'>&{{ 7 * 7 }}"

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text().filter(lambda key: key != "$float")
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=10)


def finding(value=1, plugin="cram", code="sparsity", severity="info", message="Half is zero.", **where):
    return Finding(plugin, code, severity, value, message, **where)


def same(a, b):
    """Equality in which nan equals nan and 1 is not 1.0."""
    return type(a) is type(b) and repr(a) == repr(b)


# Plain values


@given(values)
def test_every_plain_value_survives_strict_json(value):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = dumps(plain(value))
    json.loads(text, parse_constant=refuse)
    assert same(loads(text), value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(3), 3),
        (torch.tensor([0.5, 1.0], requires_grad=True), [0.5, 1.0]),
        (torch.tensor([1.5], dtype=torch.bfloat16), [1.5]),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([[1, 2]]), [[1, 2]]),
        ({np.int64(0): (1, 2)}, {"0": [1, 2]}),
    ],
)
def test_tensors_and_numpy_values_become_plain(value, expected):
    assert same(plain(value), expected)


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, torch.tensor(1j), b"x", {(1, 2): 3}, {1: 0, "1": 0}])
def test_what_is_not_plain_is_refused_by_name(value):
    with pytest.raises(TypeError, match="finding 'sparsity' of cram cannot be stored: value"):
        Report().add([finding(value)])


def test_the_refusal_says_where_in_a_nested_value():
    with pytest.raises(TypeError, match="value: group: a: set is not a plain value"):
        Report().add([finding({"group": {"a": {1}}})])


def test_meta_that_is_not_plain_is_refused_by_name():
    with pytest.raises(TypeError, match="meta of the report cannot be stored: module: object"):
        Report({"module": object()})


# Findings by key


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


# On disk


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
    code = (
        "import sys; from groundwire.report import Report; Report.read(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


# The page


class Elements(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_data(self, data):
        self.text += data

    def values(self, key):
        return [value for _, name, value in self.attributes if name == key]


def hostile_figure():
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(HOSTILE)
    axes.plot([0, 1], label=HOSTILE)
    axes.legend()
    axes.text(0.5, 0.5, "link", url="javascript:alert(1)", gid=HOSTILE)
    return figure


def test_hostile_names_are_shown_and_never_become_markup():
    section = Section(HOSTILE, HOSTILE, [Table(HOSTILE, [HOSTILE], [[HOSTILE]])], [hostile_figure])
    epochs = [finding({HOSTILE: HOSTILE}, HOSTILE, HOSTILE, "fail", HOSTILE, stage=HOSTILE, epoch=e) for e in (0, 1)]
    page = Elements(render({HOSTILE: HOSTILE, "module": HOSTILE}, epochs, [(HOSTILE, section)]))
    assert "script" not in page.tags
    assert "a" not in page.tags
    assert not any(key.startswith("on") for _, key, _ in page.attributes)
    assert not any("javascript" in value for value in page.values("href"))
    assert page.text.count(HOSTILE) >= 12
    assert HOSTILE in page.values("aria-label")


def test_the_page_asks_for_nothing_from_outside():
    image = Figure()
    image.subplots().imshow([[0, 1]])
    markup = render({}, [], [("cram", Section("Images", figures=[image, hostile_figure]))])
    page = Elements(markup)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.values("content")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    addresses = page.values("src") + page.values("href")
    assert any(address.startswith("data:image/png;") for address in addresses)
    assert all(address.startswith(("#", "data:image/png;")) for address in addresses)
    assert "url(http" not in markup
    assert "@import" not in markup


def test_ids_are_unique_and_every_reference_has_its_target():
    figures = [hostile_figure, hostile_figure, hostile_figure()]
    page = Elements(render({}, [], [("a", Section("A", figures=figures)), ("b", Section("B", figures=figures[:1]))]))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = page.values("href") + page.values("aria-labelledby")
    references += [f"#{value.split('(#')[1].rstrip(')')}" for value in page.values("clip-path")]
    assert references
    assert {reference.lstrip("#") for reference in references} <= set(ids)


def test_equal_reports_give_equal_pages():
    sections = [("cram", Section("A", figures=[hostile_figure]))]
    assert render({}, [finding()], sections) == render({}, [finding()], sections)


def test_a_figure_that_fails_becomes_a_note():
    def fail():
        raise RuntimeError(f"no data {HOSTILE}")

    page = Elements(render({}, [], [("cram", Section("A", "Still here.", figures=[fail, 3, Figure()]))]))
    assert f"could not be drawn: RuntimeError: no data {HOSTILE}" in page.text
    assert "could not be drawn: TypeError" in page.text
    assert "Still here." in page.text
    assert page.tags.count("svg") == 1


def test_a_pyplot_figure_is_closed_and_its_settings_stay():
    mpl.use("agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots()
    fonttype = mpl.rcParams["svg.fonttype"]
    svg(figure, "f-", "name")
    assert figure.number not in pyplot.get_fignums()
    assert mpl.rcParams["svg.fonttype"] == fonttype


def test_a_figure_has_a_name_follows_the_theme_and_keeps_text_on_images():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], "k", label="line")
    left.legend(facecolor="white")
    right.imshow([[0, 1]])
    right.text(0, 0, "on the image")
    page = Elements(svg(figure, "f-", "Section, figure 1"))
    assert page.values("role") == ["img"]
    assert page.values("aria-label") == ["Section, figure 1"]
    styles = " ".join(page.values("style"))
    assert "currentColor" in styles
    assert "fill: var(--card)" in styles
    assert "#000000" not in styles
    assert page.values("fill") == ["currentColor", "#000000"]
    assert "style" not in page.tags


def test_letters_that_the_font_lacks_are_shown_without_a_warning():
    figure = Figure()
    figure.subplots().set_xlabel("\u6a21\u578b \U0001f600")
    assert "\u6a21\u578b \U0001f600" in Elements(svg(figure, "f-", "name")).text


def test_the_title_of_a_figure_is_its_name():
    figure = Figure()
    figure.suptitle("All")
    for axes in figure.subplots(1, 2):
        axes.set_title("One")
    assert Elements(svg(figure, "f-", "fallback")).values("aria-label") == ["All; One"]


def test_the_latest_epoch_is_shown_and_counted_and_the_others_are_folded():
    findings = [finding(e, severity="fail" if e == 0 else "info", epoch=e) for e in (0, 2, 1)]
    page = render({}, findings, [])
    shown, folded = page.split("<details>")
    assert "epoch 2" in shown
    assert '<li class="fail none">' in shown  # the old failure is not counted
    assert "2 earlier" in folded
    assert folded.index('<td class="number">1</td>') < folded.index('<td class="number">0</td>')


def test_a_finding_about_the_whole_run_is_the_latest():
    page = render({}, [finding("whole", message="whole"), finding("part", message="part", epoch=9)], [])
    assert "whole" in page.split("<details>")[0]


def test_the_worst_findings_of_a_plugin_come_first():
    page = render({}, [finding(code=s, severity=s) for s in ("info", "warn", "fail")], [])
    places = [page.index(f"<code>{s}</code>") for s in ("fail", "warn", "info")]
    assert places == sorted(places)


# Numbers


@given(st.lists(scalars))
def test_any_column_can_be_shown(cells):
    shown = show_column(cells)
    assert len(shown) == len(cells)
    assert all(isinstance(text, str) for text in shown)


@given(st.floats(-1e300, 1e300))
def test_a_shown_float_is_close_to_the_value(value):
    assert float(show(value).replace(",", "")) == pytest.approx(value, rel=6e-3, abs=1e-300)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.98712, "0.9871"), (2026, "2026"), (1203456, "1,203,456"), (1e-7, "1e-07"), (0.0, "0.0"), (-math.inf, "-∞")],
)
def test_numbers_read_well(value, text):
    assert show(value) == text


def test_columns_of_numbers_are_right_aligned_and_short_rows_are_filled():
    table = Table("", ["model", "accuracy"], [["dense", 0.9], ["pruned"], ["x", 0.25, "extra"]])
    assert columns(table) == [
        ("model", False, ["dense", "pruned", "x"]),
        ("accuracy", True, ["0.9000", "—", "0.2500"]),
        ("", False, ["—", "—", "extra"]),
    ]
    assert not is_numeric(["a", 1])
