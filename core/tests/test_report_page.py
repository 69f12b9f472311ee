"""The page is safe to open, asks for nothing from outside, and reads well."""

import math

import pytest
from core_report_values import HOSTILE, Elements, finding, hostile_figure, scalars
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from groundwire.display import is_numeric, show, show_column
from groundwire.records import Section, Table
from groundwire.services.report.page import columns, render


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


@given(st.lists(scalars))
def test_any_column_can_be_shown(cells):
    shown = show_column(cells)
    assert len(shown) == len(cells)
    assert all(isinstance(text, str) for text in shown)


@given(st.floats(-1e300, 1e300))
@example(5.85876907478968e-05)
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


def test_many_remarks_are_folded_and_what_is_wrong_never_is():
    many = [finding(code=f"accuracy@{i}", message=f"Remark {i}.") for i in range(9)]
    wrong = [finding(code=severity, severity=severity, message=f"A {severity}.") for severity in ("warn", "fail")]
    page = render({}, many + wrong, [])
    shown, folded = page.split("<details", 1)
    assert all(f"Remark {i}." in folded for i in range(9))
    assert "Remark" not in shown
    assert "A fail." in shown
    assert "A warn." in shown
    assert "<details" not in render({}, many[:8] + wrong, [])
