"""What is said of a run."""

import csv

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from limes_digit_stream import Digits, fit, module_of, stream
from torch import nn
from torch.utils.data import DataLoader

from groundwire import Report
from groundwire_limes import LIMES
from groundwire_limes.functional import log_offset


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(10)), "class weights"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing"),
        (type("FocalLoss", (nn.CrossEntropyLoss,), {})(), "does not give the posterior"),
    ],
)
def test_losses_that_move_the_prior_are_said_and_reported(kit, loss, text):
    class Module(Digits):
        def __init__(self):
            super().__init__()
            self.loss = loss

        def training_step(self, batch, batch_idx):
            return self.loss(self(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=text):
        fit(kit, LIMES(), module_of(2), Module(), report=True)
    [folder] = (kit.path / "groundwire").iterdir()
    assert any(text in f.message for f in Report.read(folder).findings if f.severity == "warn")


def test_balanced_samplers_are_said(kit):
    data, times = stream(1)
    rows = [(x, y, {"timestamp": float(t)}) for (x, y), t in zip(data, times, strict=True)]
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(len(rows)), len(rows))
    with pytest.warns(UserWarning, match="WeightedRandomSampler draws the classes with other frequencies"):
        kit.trainer(LIMES()).fit(Digits(), DataLoader(rows, 20, sampler=sampler))


def test_the_report_has_prequential_accuracy_worst_hours_divergence_and_pictures(kit):
    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    limes = LIMES(season="4h")
    fit(kit, limes, report=True, logger=logger)
    report = Report.read(kit.path)
    found = {f.code: f.value for f in report.findings}
    qualities = [limes._tracker.class_counts.quality(s)["accuracy"] for s in range(12)]
    assert found["mean_accuracy"] == pytest.approx(np.mean(qualities))
    worst = [min(qualities[i : i + 4]) for i in (0, 4, 8)]
    assert found["worst_step_accuracy"] == pytest.approx(np.mean(worst))
    assert found["divergence"] > 0
    assert found["guarded_steps"] >= 0
    page = report.path.read_text()
    assert page.count("<svg") == 3
    assert "prequential" in page
    with (kit.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["limes/accuracy"]) for row in rows if row["limes/accuracy"]]
    assert logged == pytest.approx(qualities[:-1])  # each step when it is over, log_every_n_steps or not
    assert sum(bool(row["limes/divergence"]) for row in rows) >= len(logged)
    guarded = [float(row["limes/guarded"]) for row in rows if row["limes/guarded"]]
    assert sum(guarded) == found["guarded_steps"] > 0


def test_a_checkpoint_can_monitor_the_last_complete_step(kit):
    limes = LIMES()
    best = pl.callbacks.ModelCheckpoint(kit.path, monitor="limes/accuracy", mode="max")
    kit.trainer(limes, best, enable_checkpointing=True).fit(Digits(), datamodule=module_of())
    assert float(best.best_model_score) == pytest.approx(limes._tracker.class_counts.quality(10)["accuracy"])


def test_prequential_accuracy_is_that_of_the_forecast_before_the_batch_was_learned_from(kit):
    limes, datamodule = LIMES(training_prior="realised"), module_of()

    class Before(Digits):
        hits, rows = 0, 0

        def training_step(self, batch, batch_idx):
            offset = torch.tensor(
                log_offset(limes._tracker.forecast(limes._tracker.current).prior), dtype=torch.float32
            )
            with torch.no_grad():
                scores = self.net[2].forward(self.net[:2](batch[0])) + offset  # no hooks
            self.hits += int((scores.argmax(1) == batch[1]).sum())
            self.rows += len(batch[1])
            return super().training_step(batch, batch_idx)

    before = Before()
    kit.trainer(limes).fit(before, datamodule=datamodule)
    sums = sum(row[10:] for row in limes._tracker.class_counts.known.values())
    assert (sums[0], sums[1]) == (before.rows, before.hits)
