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
def core(monkeypatch):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    # Not by its name: pytest calls the folder core/ a package of that name.
    spec = importlib.util.spec_from_file_location("benchmarks_core", folder / "core.py")
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    # It would hold for the rest of the test process.
    monkeypatch.setattr(core, "keep_freed_memory", lambda: None)
    threads, levels = torch.get_num_threads(), {log: log.level for log in map(logging.getLogger, LOGGERS)}
    yield core
    torch.set_num_threads(threads)
    for log, level in levels.items():
        log.setLevel(level)
    sys.modules.pop("measure")


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
