"""The example runs as a user runs it, at small size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_example_trains_certifies_and_draws(tmp_path):
    picture = tmp_path / "aol.svg"
    command = [sys.executable, ROOT / "examples/aol_digits.py", "--epochs", "1", "--width", "32"]
    command += ["--picture", picture, "--report", tmp_path / "report"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "AOL-FC" in done.stdout
    assert "AOL-Conv" in done.stdout
    assert picture.read_text().startswith("<?xml")
    assert len(list((tmp_path / "report").glob("*/report.html"))) == 2
