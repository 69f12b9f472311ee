"""The benchmark's zoo and its other parts at their smallest size. Times are never asserted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from groundwire_aol import lipschitz_bound

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import aol_zoo

    yield aol_zoo
    for name in ("aol_zoo", "aol_rows"):
        sys.modules.pop(name, None)


def test_the_zoo_is_large_and_its_first_modules_are_sound(zoo):
    entries = zoo.zoo()
    assert len({entry.name for entry in entries}) == len(entries) >= 60
    for entry in entries[::6]:
        verdict, bound, norm, rounding = zoo.audit(entry, kind=7)
        assert verdict == "refused" or norm <= bound * (1 + 1e-9), entry.name
        assert rounding is None or rounding <= 1, entry.name


def test_a_wrong_bound_would_be_counted(zoo, monkeypatch):
    monkeypatch.setattr(zoo, "lipschitz_bound", lambda *a: replace(lipschitz_bound(*a), value=1e-3))
    monkeypatch.setattr(zoo, "zoo", lambda: [zoo.Entry("identity", lambda: zoo.nn.Sequential(zoo.nn.Flatten()), (4,))])
    monkeypatch.setattr(zoo, "KERNELS", 2)
    assert zoo.soundness(quick=False)[0].median == 2


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import aol_fuzz

    yield aol_fuzz
    for name in ("aol_fuzz", "aol_rows"):
        sys.modules.pop(name, None)


# Drawn graphs have constants of any kind, of which torch and this package warn.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_random_graph_has_a_bound_below_its_jacobians(fuzz):
    verdicts = [fuzz.judge(seed, falsify=seed % 4 == 0) for seed in range(100)]
    assert [v for v in verdicts if not v.refused and v.unsound] == []
    assert sum(not v.refused for v in verdicts) > 50
    assert len({name for v in verdicts if v.refused for name in v.names if name in fuzz.FALSE}) > 5


def test_a_false_bound_of_a_graph_would_be_counted(fuzz, monkeypatch):
    monkeypatch.setattr(fuzz, "lipschitz_bound", lambda *a, **k: replace(lipschitz_bound(*a, **k), value=1e-3))
    assert any(fuzz.judge(seed).unsound for seed in range(1, 10))


@pytest.mark.slow
def test_a_part_runs_from_the_command_line_and_writes_its_values(tmp_path):
    command = [sys.executable, FOLDER / "aol.py", "--quick", "--only", "strided", "--json", tmp_path / "aol.json"]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = {row["what"]: row for row in json.loads((tmp_path / "aol.json").read_text())["results"]}
    assert all(row["met"] for row in results.values())
    assert len(results) == 3
