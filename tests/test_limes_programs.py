"""The example and the benchmark of LIMES at their smallest size. Accuracies and times themselves are never asserted."""

import importlib.util
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LOGGERS = ("lightning.pytorch", "lightning.fabric")
SIBLINGS = ("measure", "limes_cost", "limes_data", "limes_simulation", "limes_streams")


def program(path, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quiet():
    """They set threads and silence Lightning's advice, for themselves only."""
    threads, levels = torch.get_num_threads(), {log: log.level for log in map(logging.getLogger, LOGGERS)}
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    for log, level in levels.items():
        log.setLevel(level)


@pytest.fixture
def benchmark(monkeypatch, quiet):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    module = program("benchmarks/limes.py", "benchmarks_limes")
    monkeypatch.setattr("limes_simulation.ROWS", 200)  # in an hour
    yield module
    for name in SIBLINGS:
        sys.modules.pop(name, None)


def test_the_example_learns_two_days_with_and_without_limes_and_draws_it(quiet, tmp_path, capsys):
    example = program("examples/limes_digits.py", "limes_digits")
    picture = tmp_path / "limes.svg"
    found = example.main(["--days", "2", "--rows", "40", "--out", str(tmp_path / "out"), "--picture", str(picture)])
    assert set(found) == {"without", "with LIMES"}
    assert all(0.1 < accuracy < 1 for accuracy in found.values())
    printed = capsys.readouterr().out
    assert all(f"{name:12} {100 * accuracy:.1f} % right before learning" in printed for name, accuracy in found.items())
    assert (tmp_path / "out" / "report.html").read_text("utf-8").count("<svg") == 3
    drawn = picture.read_text("utf-8")
    assert all(text in drawn for text in ("without", "with LIMES", "share of labels"))


def test_what_the_example_draws_as_forecast_is_what_the_callback_expected(quiet, tmp_path):
    example = program("examples/limes_digits.py", "limes_digits")
    limes = example.LIMES()
    example.fit(example.stream(2, 40), tmp_path, example.Plugins([limes], report=False))
    realised, expected = example.forecasts(limes)
    assert realised.shape == expected.shape == (48, example.CLASSES)
    for hour in (0, 1, 30, 47):
        assert expected[hour].tolist() == limes.extrapolator.forecast(hour).tolist()
    assert realised.sum(axis=1) == pytest.approx(1)


@pytest.mark.slow
def test_the_benchmark_compares_every_way_and_states_every_promise(benchmark, tmp_path, capsys):
    benchmark.main(["--tiny", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    streams = {s["regime"]: s["results"] for s in found["streams"]}
    assert list(streams) == ["cycle", "random", "shift, labels 24 h late"]
    assert set(streams["cycle"]) == set(streams["random"]) == set(benchmark.ways())
    assert set(streams["shift, labels 24 h late"]) == set(benchmark.delayed_ways())
    figures = {f["figure"]: f for f in found["figures"]}
    assert {name: f["target"] for name, f in figures.items()} == {
        "gap closed, digits cycle, mean": ">= 95 %",
        "gap closed, digits cycle, worst hour": ">= 94 %",
        "order, digits cycle": "LIMES > incremental > ensemble > restart",
        "against incremental, digits random, mean": ">= -0.3",
        "against incremental, digits random, worst hour": ">= -0.5",
        "LIMES, unlabelled=True against the best fixed choice, digits shift, labels 24 h late": ">= -0.5",
        "LIMES against the best forecaster without EM, digits shift, labels 24 h late": ">= -0.5",
        "LIMES, unlabelled=True against incremental, digits shift, labels 24 h late": "> 0",
        "LIMES against incremental, digits shift, labels 24 h late": "> 0",
    }
    ours, low, high = (streams["cycle"][way][0] for way in ("LIMES", "incremental", "oracle"))
    share = 100 * (ours - low) / (high - low)
    assert figures["gap closed, digits cycle, mean"]["measured"].startswith(f"{share:.1f} %")
    assert figures["gap closed, digits cycle, mean"]["met"] is (share >= 95)
    printed = capsys.readouterr().out
    assert f"{share:.0f} %" in printed
    costs = {c["what"]: c for c in found["cost"]}
    targets = {what: c["target"] for what, c in costs.items() if c["target"] is not None}
    assert targets == {
        "step with LIMES / without, bare linear head, 512 to 250": 1.05,
        "step with LIMES / without, small convnet": 1.01,
    }
    assert all(value > 0 for c in costs.values() for value in c["values"])
