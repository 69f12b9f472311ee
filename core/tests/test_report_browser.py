"""A real browser opens the page: what it shows, what it asks for, whether it reads well on a phone and at night."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from groundwire.records import Finding, Section, Table
from groundwire.services.report.report import Report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
THEMES = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}
HOSTILE = "<img src=x onerror=alert(1)><script>alert(1)</script>"
LONG = "a_name_that_never_ends_" * 12

# Runs in a copy of the page: its width, its lowest contrast of text against what is behind it, by WCAG's formula.
PROBE = """
const lin = c => (c /= 255, c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const rgb = s => s.match(/[\\d.]+/g).map(Number);
const lum = ([r, g, b]) => 0.2126 * lin(r) + 0.7152 * lin(g) + 0.0722 * lin(b);
const behind = e => { for (; e; e = e.parentElement) {
  const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0.99) return c; } };
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(e => e.open = true);
  const seen = [...document.querySelectorAll("body *")].filter(e => !e.closest("[fill='#000000']") &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
    const style = getComputedStyle(e), [a, b] = [lum(rgb(e.closest("svg") ? style.fill : style.color)), lum(behind(e))];
    return {contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text: e.textContent.trim().slice(0, 40)}; });
  seen.sort((a, b) => a.contrast - b.contrast);
  const root = document.documentElement, svg = document.querySelector("svg").getBoundingClientRect();
  parent.postMessage({inner: innerWidth, width: root.scrollWidth, svg: svg.right, worst: seen[0], texts: seen.length,
    resources: performance.getEntriesByType("resource").map(e => e.name),
    scrolls: [...document.querySelectorAll(".scroll")].some(e => e.scrollWidth > e.clientWidth),
    dark: matchMedia("(prefers-color-scheme: dark)").matches}, "*");
});
"""
FRAME = """<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>
<script>addEventListener("message", e => document.body.dataset.probe = JSON.stringify(e.data))</script>"""


@pytest.fixture(autouse=True)
def _needs_browser():
    if BROWSER is None:
        if os.environ.get("GROUNDWIRE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"GROUNDWIRE_REQUIRE_BROWSER=1, but none of {', '.join(NAMES)} is installed")
        pytest.skip(f"none of {', '.join(NAMES)} is installed")


def browse(folder, page, *flags):
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def curve():
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    axes.plot([0, 0.5, 0.9], [0.98, 0.97, 0.6], label="pruned")
    axes.plot([0, 0.9], [0.5, 0.5], "k--", label="chance")
    axes.set(title="Accuracy after pruning", xlabel="sparsity", ylabel=HOSTILE)
    axes.legend()
    return figure


def matrix():
    figure = Figure(figsize=(4.4, 3.8))
    axes = figure.subplots()
    axes.imshow([[0.9, 0.1], [0.3, 0.7]], cmap="Blues")
    axes.text(0, 1, "0.30", ha="center")
    return figure


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    report = Report({"module": "LitClassifier", "plugins": ["cram", LONG], "max_epochs": 20})
    report.add([Finding("cram", "sparsity", "info", e / 20, "Share of zeros.", "validate", e) for e in range(20)])
    report.add([Finding("cram", "drop", "warn", {"a": LONG, "b": [0.5] * 40}, "The pruned model loses accuracy.")])
    report.add([Finding(LONG, LONG, "fail", 0.3, f"{LONG} {HOSTILE}", "test", epoch) for epoch in (0, 1)])
    wide = Table("Many columns", [f"column number {i}" for i in range(20)], [[i / 7 for i in range(20)], [LONG]])
    report.write(
        tmp_path_factory.mktemp("report"),
        [
            ("cram", Section("Compression", f"Text.\n\n{LONG}", [wide], [curve, matrix])),
            (HOSTILE, Section(HOSTILE, HOSTILE, [Table(HOSTILE, [HOSTILE], [[HOSTILE]])], [lambda: 1 / 0])),
        ],
    )
    return report.path


def probe(folder, page, width, theme):
    copy, frame = folder / "copy.html", folder / "frame.html"
    markup = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    copy.write_text(markup.replace("</head>", f"<script>{PROBE}</script></head>"), encoding="utf-8")
    frame.write_text(FRAME.format(page=copy.name, width=width, height=3000))
    dom = browse(folder, frame, THEMES[theme], "--virtual-time-budget=5000", "--dump-dom").stdout
    return json.loads(unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))


@pytest.mark.browser
def test_the_browser_shows_everything_and_complains_about_nothing(page, tmp_path):
    done = browse(tmp_path, page, "--enable-logging=stderr", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert "<script" not in done.stdout
    assert "<img" not in done.stdout
    text = unescape(re.sub(r"<[^>]*>", "", done.stdout))
    for expected in ("LitClassifier", "Accuracy after pruning", "19 earlier", "ZeroDivisionError", HOSTILE, LONG):
        assert expected in text


@pytest.mark.browser
def test_the_browser_would_have_complained(page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        page.read_text("utf-8").replace("</body>", "<img src=http://127.0.0.1:9/x><script>1</script></body>")
    )
    done = browse(tmp_path, bad, "--enable-logging=stderr", "--dump-dom")
    assert done.stderr.count("CONSOLE") >= 2


@pytest.mark.browser
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_overflows_is_fetched_or_lacks_contrast(page, tmp_path, width, theme):
    found = probe(tmp_path, page, width, theme)
    assert found["inner"] == width
    assert found["width"] == width
    assert found["svg"] <= width
    assert found["scrolls"]  # wide tables, in their own boxes
    assert found["resources"] == []
    assert found["dark"] == (theme == "dark")
    assert found["texts"] > 100
    assert found["worst"]["contrast"] >= 4.5, found["worst"]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 900)])
def test_dark_is_dark_and_light_is_light(page, tmp_path, width, height):
    # A window cannot be as narrow as a phone, so a frame is.
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width, height=height))
    means = {}
    for theme, flag in THEMES.items():
        shot = Path(os.environ.get("GROUNDWIRE_SCREENSHOTS", tmp_path)) / f"report-{theme}-{width}.png"
        browse(tmp_path, frame, flag, f"--window-size={max(width, 500)},{height}", f"--screenshot={shot}")
        pixels = imread(shot)[:height, :width, :3]
        assert np.unique(pixels.reshape(-1, 3), axis=0).shape[0] > 50
        means[theme] = pixels.mean()
    assert means["light"] > 0.8
    assert means["dark"] < 0.3
