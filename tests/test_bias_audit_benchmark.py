"""The benchmark of the bias audit at its smallest size: every row is there. Times themselves are never asserted."""

import importlib.util
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

LOGGERS = ("lightning.pytorch", "lightning.fabric")


def loaded(monkeypatch, name):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch):
    module = loaded(monkeypatch, "bias_audit")
    threads, levels = torch.get_num_threads(), {log: log.level for log in map(logging.getLogger, LOGGERS)}
    with warnings.catch_warnings():  # it silences Lightning's advice
        yield module
    torch.set_num_threads(threads)
    for log, level in levels.items():
        log.setLevel(level)
    for name in ("measure", "bias_audit_overhead", "bias_audit_planted", "bias_audit_tabular"):
        sys.modules.pop(name, None)


def data(folder):
    """Two files with the columns of COMPAS and of German credit."""
    rng = np.random.default_rng(0)
    compas = pd.DataFrame({name: rng.integers(0, 9, 300) for name in ("age", "priors_count", "two_year_recid")})
    compas["two_year_recid"] %= 2
    for name in ("juv_fel_count", "juv_misd_count", "juv_other_count"):
        compas[name] = rng.integers(0, 3, 300)
    words = {"c_charge_degree": "FM", "age_cat": "abc", "race": "xyz", "sex": "fm"}
    for name, letters in words.items():
        compas[name] = rng.choice(list(letters), 300)
    compas.to_csv(folder / "compas-nonames.csv", index=False)
    german = pd.DataFrame({name: rng.integers(1, 9, 300) for name in ("Age", "Job", "Credit amount", "Duration")})
    for name in ("Housing", "Saving accounts", "Checking account", "Purpose"):
        german[name] = rng.choice(["a", "b", None], 300)
    german["Sex"], german["Risk"] = rng.choice(["male", "female"], 300), rng.choice(["good", "bad"], 300)
    german.to_csv(folder / "german_credit_data.csv", index=False)


@pytest.mark.slow
def test_the_bias_audit_benchmark_measures_every_promise(benchmark, tmp_path, capsys):
    data(tmp_path)
    benchmark.main(["--tiny", "--quick", "--data", str(tmp_path), "--json", str(tmp_path / "out.json")])
    results = {row["what"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    targets = {name: row["target"] for name, row in results.items() if row["target"] is not None}
    assert targets == {
        "difference to fairlearn, 1 M rows": 0.0,
        "difference to fairlearn, audit() from strings": 0.0,
        "counts and all outputs / fairlearn": 1 / 1000,
        "counts and all outputs / pandas": 1 / 4,
        "audit() from strings / fairlearn": 1 / 200,
        "audit() from strings / pandas": 1.0,
        "audit() from object strings / pandas": 1.0,
        "audit() from a <U array / pandas": 1.0,
        "100 bootstrap draws / fairlearn": 1 / 1000,
        "distance of intervals / fairlearn's own noise": 1.25,
        "false alarms of 2, worst setting": 1,
        "false alarms over all settings": 5.5,
        "planted group missed, of all versions": 0.0,
        "versions in which another attribute is accused": 0.0,
        "validation epoch, more time with the audit": 3.0,
    }
    assert results["difference to fairlearn, 1 M rows"]["median"] == 0.0
    assert results["difference to fairlearn, audit() from strings"]["median"] == 0.0
    shown = {"COMPAS, dense: accuracy", "German, 0.95: largest gap", "power, true gap 0.1, 10 groups x 500"}
    shown |= {
        "effect of the mark on all test images, 0.98",
        "the same, its values drawn again",
        "chance that no version accuses another attribute",
    }
    assert shown <= set(results)
    assert "German: report written" in capsys.readouterr().out


def test_the_simulation_of_the_gate_shows_level_and_power_of_every_setting(monkeypatch, tmp_path):
    gate = loaded(monkeypatch, "bias_audit_gate")
    monkeypatch.setattr(gate, "WITHIN", gate.WITHIN[1:6:4])
    monkeypatch.setattr(gate, "BEYOND", [*gate.BEYOND[:2], gate.BEYOND[-1]])
    rows = gate.main(["--draws", "8", "--json", str(tmp_path / "gate.json")])
    results = {row["what"]: row for row in json.loads((tmp_path / "gate.json").read_text())["results"]}
    assert len(results) == len(rows)
    assert results["false alarms, 2 x 20,000 with a gap of 0.02, 4 x 60"]["median"] == 0
    assert results["old rule, 2 x 20,000 with a gap of 0.02, 4 x 60"]["median"] > 0.5
    assert results["power, 3 x 3,000, one lower by 0.12"]["median"] >= 0.9
    assert all(row.met is not False for row in rows)
    sys.modules.pop("measure", None)
