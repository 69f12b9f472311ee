"""Figures of a report: named, themed, closed, and no page lost when one fails."""

import matplotlib as mpl
from core_report_values import HOSTILE, Elements
from matplotlib.figure import Figure

from groundwire.records import Section
from groundwire.services.report.figures import svg
from groundwire.services.report.page import render


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
