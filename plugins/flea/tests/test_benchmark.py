"""The benchmark at its smallest size, on rows in the format of its three files. Times are never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"
ROWS = 500


@pytest.fixture
def files(tmp_path):
    """Of each data set the columns that are read; the label follows one column and, a little, the group."""
    rng = np.random.default_rng(0)
    group, signal = rng.integers(2, size=ROWS), rng.normal(size=ROWS)
    label = (signal + 0.5 * group + rng.normal(size=ROWS) > 0).astype(int)

    def any_of(*words):
        return rng.choice(list(words), ROWS)

    compas = {
        "days_b_screening_arrest": rng.integers(-40, 40, ROWS), "is_recid": label, "c_charge_degree": any_of("F", "M"),
        "score_text": any_of("Low", "High"), "race": any_of("Asian", "Caucasian"), "age_cat": any_of("young", "old"),
        "sex": np.where(group == 1, "Female", "Male"), "priors_count": signal.round(1), "two_year_recid": label,
    }  # fmt: skip
    numbers = (
        "Age",
        "Education",
        "Country",
        "Ethnicity",
        "Nscore",
        "Escore",
        "Oscore",
        "Ascore",
        "Cscore",
        "Impulsive",
    )
    drugs = {name: rng.normal(size=ROWS) for name in numbers}
    drugs |= {"SS": signal, "Gender": group - 0.5, "Coke": np.where(label == 1, "CL3", "CL0")}
    german = {
        "Saving accounts": any_of("little", "rich", None), "Checking account": any_of("little", None),
        "Age": rng.integers(18, 80, ROWS), "Duration": signal, "Credit amount": rng.integers(500, 9000, ROWS),
        "Sex": np.where(group == 1, "female", "male"), "Risk": np.where(label == 1, "good", "bad"),
    }  # fmt: skip
    named = {"compas-nonames": compas, "drug_consumption": drugs, "german_credit_data": german}
    for name, columns in named.items():
        pd.DataFrame(columns).to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


@pytest.mark.slow
def test_every_data_set_learner_and_method_has_its_row(files):
    command = [sys.executable, FOLDER / "flea.py", "--tiny", "--data", files, "--json", files / "flea.json"]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((files / "flea.json").read_text())
    rows = {(row["data"], row["learner"], row["method"]): row for row in found["quality"]}
    learners = {"fair-reg", "fair-reg, classes not balanced", "resample", "unaware"}
    methods = {"oracle", "naive", "ensemble", "Konstantinov 2020", "FLEA"}
    data = {"compas", "drugs", "germancredit"}
    assert set(rows) == {(d, learner, m) for d in data for learner in learners for m in methods}
    assert all(np.shape(row["values"]) == (1, 2) and 0 <= np.min(row["values"]) <= 100 for row in rows.values())
    assert {row["met"] for key, row in rows.items() if key[1] == "fair-reg" and key[2] == "FLEA"} <= {"yes", "NO"}
    assert found["kept"]["runs"] == 3
    assert [(row["data"], row["group"], row["runs"]) for row in found["flips"]] == [
        (name, group, 1) for name in ("compas", "drugs", "germancredit") for group in (0, 1)
    ]
    assert all(row["warned"] <= row["kept"] <= 1 for row in found["flips"])
    targets = {row["what"]: row["target"] for row in found["results"]}
    assert targets == {"filter / single-pair loop, n=5": 1 / 5, "filter, n=5": 0.05, "single-pair loop, n=5": None}
    assert "Runs with a malicious source kept" in done.stdout
