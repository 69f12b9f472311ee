"""The benchmarks at their smallest size: every row is there, with its spread. Times themselves are never asserted."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

LOGGERS = ("lightning.pytorch", "lightning.fabric")


@pytest.fixture
def benchmark(monkeypatch):
    """Loads a benchmark; afterwards threads, log levels and imported modules are as before."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)

    def load(name):
        # Not by its name: pytest calls the folder core/ a package of that name.
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    threads, levels = torch.get_num_threads(), {log: log.level for log in map(logging.getLogger, LOGGERS)}
    before, path = set(sys.modules), list(sys.path)
    yield load
    torch.set_num_threads(threads)
    sys.path[:] = path
    for log, level in levels.items():
        log.setLevel(level)
    for name in set(sys.modules) - before:
        if str(folder.parent) in str(getattr(sys.modules[name], "__file__", "")) and "/src/" not in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


@pytest.fixture
def core(benchmark, monkeypatch):
    core = benchmark("core")
    # It would hold for the rest of the test process.
    monkeypatch.setattr(core, "keep_freed_memory", lambda: None)
    return core


@pytest.mark.slow
def test_the_core_benchmark_measures_every_promise(core, tmp_path, capsys):
    core.main(["--quick", "--steps", "1", "--json", str(tmp_path / "core.json")])
    written = json.loads((tmp_path / "core.json").read_text())
    assert {"python", "torch", "cores", "threads"} <= written["machine"].keys()
    results = {row["what"]: row for row in written["results"]}
    assert {name: row["target"] for name, row in results.items() if row["target"]} == {
        "idle plugin, per step": 25,
        "replayed step / two passes": 1.03,
        "import groundwire": 100,
        "import Plugin too": 100,
        "import all of a run": 100,
    }
    for row in written["results"]:
        assert row["values"]
        assert row["met"] is (None if row["target"] is None else row["median"] <= row["target"])
    assert results["checkpoint with / without"]["median"] < 1.01
    shown = capsys.readouterr().out
    assert all(name in shown for name in results)


@pytest.mark.slow
def test_crams_tables_have_every_way_version_and_target(benchmark, tmp_path):
    cram, picture = benchmark("cram"), benchmark("cram_picture")
    arguments = [
        "--quick",
        "--only",
        "accuracy",
        "text",
        "steps",
        "--seeds",
        "1",
        "--json",
        str(tmp_path / "cram.json"),
    ]
    cram.main(arguments)
    rows = {row["what"]: row for row in json.loads((tmp_path / "cram.json").read_text())["results"]}
    ways = ("SGD", "SGD, epochs x 2", "SGD, lr x 2", "SAM", "CrAM")
    versions = ("dense", "80 %", "90 %", "95 %")
    assert {f"digits, {way}, {version}" for way in ways for version in versions} <= rows.keys()
    targets = {what: row["target"] for what, row in rows.items() if row["target"]}
    assert targets == {
        "digits, CrAM, 90 %": 98.3,
        "digits, CrAM, 95 %": 97.5,
        "digits, dense: SGD - CrAM": 0.3,
        "CrAMOptimizer.step without passes, fused SGD, 1 thread": 10.5,
    }
    assert rows["digits, CrAM, 90 %"]["met"] is (rows["digits, CrAM, 90 %"]["mean"] >= 98.3)
    assert {
        f"BERT shape, {way}, {version}" for way in ("AdamW", "CrAM") for version in ("dense", "80 %")
    } <= rows.keys()
    assert "ResNet20, batch 32, step with CrAM / without" in rows
    picture.picture(tmp_path / "cram.json", tmp_path / "cram.svg")
    assert "CrAM" in (tmp_path / "cram.svg").read_text()
