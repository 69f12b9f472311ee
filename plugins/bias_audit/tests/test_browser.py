"""A real browser opens the page of an audit: nothing fails, nothing is fetched, and it fits a phone."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from groundwire import Report
from groundwire_bias_audit import BiasAudit

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
HOSTILE = "<script>alert(1)</script>"
PROBE = """
addEventListener("load", () => { document.querySelectorAll("details").forEach(e => e.open = true);
  const root = document.documentElement;
  const drawn = [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect().right);
  parent.postMessage({inner: innerWidth, width: root.scrollWidth, figures: drawn.length, right: Math.max(...drawn),
    images: document.querySelectorAll("svg image").length,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))}, "*"); });
"""
FRAME = """<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;height:3000px"></iframe>
<script>addEventListener("message", e => document.body.dataset.probe = JSON.stringify(e.data))</script>"""


@pytest.fixture(autouse=True)
def _needs_browser():
    if BROWSER is None:
        if os.environ.get("GROUNDWIRE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"GROUNDWIRE_REQUIRE_BROWSER=1, but none of {', '.join(NAMES)} is installed")
        pytest.skip(f"none of {', '.join(NAMES)} is installed")


class Digits(Dataset):
    def __init__(self):
        images, digits = load_digits(return_X_y=True)
        self.x = torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
        self.y = torch.tensor(digits >= 5).long()
        self.writer = np.array(["ann", HOSTILE, "$bob_{"])[np.arange(len(digits)) % 3]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[BiasAudit("writer", variants=[0.8, 0.95])], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = DataLoader(Digits(), 128)
    trainer.fit(Classifier(), loader, loader)
    return Report.read(folder).path


def browse(folder, page, *flags):
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90)


@pytest.mark.browser
def test_the_browser_complains_about_nothing_and_shows_everything(page, tmp_path):
    done = browse(tmp_path, page, "--enable-logging=stderr", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert "<script" not in done.stdout
    assert "could not be drawn" not in done.stdout
    text = unescape(re.sub(r"<[^>]*>", "", done.stdout))
    for expected in (
        "Variants of the model", "Gated gaps", "Groups of writer", "Confusion by confidence", HOSTILE, "$bob_{",
        "Changes in variant 0.95", "susceptible", "Flipped in variant 0.95", "accuracy of each group",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overflows_and_nothing_is_fetched(page, tmp_path, width):
    copy, frame = tmp_path / "copy.html", tmp_path / "frame.html"
    markup = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    copy.write_text(markup.replace("</head>", f"<script>{PROBE}</script></head>"), encoding="utf-8")
    frame.write_text(FRAME.format(page=copy.name, width=width))
    dom = browse(tmp_path, frame, "--virtual-time-budget=5000", "--dump-dom").stdout
    found = json.loads(unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
    assert found["inner"] == found["width"] == width
    assert found["right"] <= width
    assert found["figures"] >= 4
    assert found["images"] >= 8
    assert found["fetched"] == []
