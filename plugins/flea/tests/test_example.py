"""The example runs, tells both results, and draws its pictures."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

PATH = Path(__file__).parents[3] / "examples" / "flea_clinics.py"


@pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")
def test_the_example_compares_both_trainings_and_draws(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("flea_clinics", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(["--epochs", "15", "--seeds", "1", "--pictures", str(tmp_path)])
    gaps = {name: values[0, 1] for name, values in found.items()}
    assert gaps["clinics that FLEA kept"] < gaps["all clinics"]
    assert "suppressed [1, 3]" in capsys.readouterr().out
    for name in ("scores", "distances"):
        assert ElementTree.parse(tmp_path / f"flea_{name}.svg").getroot().tag.endswith("svg")
