"""JSON, HTML, CSV and the command line, also with hostile names."""

import csv
import json
import re
import subprocess
import sys
from html import unescape

import numpy as np
import pandas as pd
import pytest

from groundwire_bias_audit import audit
from groundwire_bias_audit.cli import main

HOSTILE = "<img src=x onerror=alert(1)>"
FORMULA = '=HYPERLINK("http://x","y")'


def predictions(rows=600, gap=0.0, seed=0):
    rng = np.random.default_rng(seed)
    g = rng.choice(["north", "south"], rows)
    y = rng.integers(0, 2, rows)
    right = rng.random(rows) < np.where(g == "north", 0.9, 0.9 - gap)
    pred = np.where(right, y, 1 - y)
    score = np.where(pred == 1, 0.5 + rng.random(rows) / 2, rng.random(rows) / 2)
    return pd.DataFrame({"y": y, "pred": pred, "score": score, "region": g, "sex": rng.choice(["f", "m"], rows)})


@pytest.fixture
def file(tmp_path):
    def write(name="p.csv", **options):
        path = tmp_path / name
        table = predictions(**options)
        table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
        return str(path)

    return write


def test_json_is_strict_and_complete():
    table = predictions(gap=0.3)
    result = audit(table["y"], table["score"], sensitive_features=table[["region", "sex"]], baseline_pred=table["pred"])
    found = json.loads(result.to_json(), parse_constant=lambda c: pytest.fail(c))
    assert (found["schema"], found["verdict"], found["rows"]) == (2, "disparity", 600)
    assert set(found["by_group"]) == {"region", "sex", "region x sex"}
    assert found["by_group"]["region"][0]["accuracy"] == result.to_frame("region")["accuracy"].iloc[0]
    assert found["by_group"]["region x sex"][0]["group"] == ["north", "f"]
    assert len(found["tests"]) == 6
    assert found["comparison"]["verdict"] == "pass"
    assert {"gate", "intervals", "limitations", "impact_ratios"} <= set(found)
    undefined = audit([0, 0], y_pred=[0, 1], sensitive_features=["a", "b"])
    assert json.loads(undefined.to_json())["by_group"]["sensitive_feature_0"][0]["true_positive_rate"] is None


@pytest.mark.parametrize("metrics", [["accuracy"], ["roc_auc", "precision"], ["uncertainty"]])
def test_page_and_files_can_be_had_with_some_metrics_only(metrics):
    table = predictions()
    features = table[["region", "sex"]]
    result = audit(table["y"], table["score"], sensitive_features=features, metrics=metrics)
    whole = audit(table["y"], table["score"], sensitive_features=features)
    assert set(json.loads(result.to_json())["by_group"]["sex"][0]) == {"group", "count", *metrics}
    assert result.impact_ratios().equals(whole.impact_ratios())
    assert result.to_html().count("<svg") == whole.to_html().count("<svg")


def test_hostile_names_are_escaped_in_html():
    groups = np.where(np.arange(200) % 2, HOSTILE, "$\\frac{1}{2$ & _{")
    y = np.arange(200) // 2 % 2
    page = audit(y, y * 0.8 + 0.1, sensitive_features={HOSTILE: groups}).to_html()
    assert HOSTILE not in page
    assert "&lt;img src=x" in page
    assert "could not be drawn" not in page
    assert page.count("<svg") >= 2


@pytest.mark.parametrize("name", ["count", "accuracy", "flip_rate", "target"])
def test_a_feature_may_be_called_like_a_metric(name, tmp_path, capsys):
    table = predictions(gap=0.3).rename(columns={"region": name})
    result = audit(table["y"], table["score"], sensitive_features=table[[name]], baseline_pred=table["pred"])
    assert name in result.to_html()
    assert result.to_csv().startswith(name if name not in ("count", "accuracy") else f"group {name},count")
    several = audit(table[["y", "pred"]], table[["score", "score"]], sensitive_features=table[[name]])
    assert len(several.to_csv().splitlines()) == 1 + 2 * 2
    assert len(json.loads(several.to_json())["by_group"][name]) == 4
    table.to_csv(tmp_path / "p.csv", index=False)
    assert main([str(tmp_path / "p.csv"), "--label", "y", "--score", "score", "--groups", name]) == 1
    assert "north" in capsys.readouterr().out


def test_spreadsheets_run_nothing(tmp_path):
    y = np.arange(80) % 2
    names = np.array([FORMULA, "+1", "-1", "@x", "\tx", "fine"])[np.arange(80) % 6]
    text = audit(y, y_pred=y, sensitive_features={FORMULA: names}).to_csv(tmp_path / "a.csv")
    cells = pd.read_csv(tmp_path / "a.csv")
    assert cells.columns[0] == "'" + FORMULA
    assert {c[0] for c in cells.iloc[:, 0]} == {"'", "f"}
    assert not re.search(r"(^|,)\"?[=+@\t]", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "code"),
    [({"gap": 0.0}, 0), ({"gap": 0.3}, 1), ({"rows": 40}, 3)],
)
@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_the_exit_code_is_the_verdict(file, capsys, options, code, name):
    path = file(name, **options)
    assert main([path, "--label", "y", "--score", "score", "--groups", "region", "sex"]) == code
    shown = capsys.readouterr().out
    assert {0: "pass", 1: "disparity", 3: "insufficient data"}[code] in shown


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("semicolons.csv", {"sep": ";"}),
        ("tabs.tsv", {"sep": "\t"}),
        ("mark.csv", {"encoding": "utf-8-sig"}),
        ("quoted.csv", {"quoting": csv.QUOTE_ALL, "lineterminator": "\r\n"}),
        ("packed.csv.gz", {}),
    ],
)
def test_tables_of_other_programs_are_read(file, tmp_path, capsys, name, options):
    pd.read_csv(file()).to_csv(tmp_path / name, index=False, **options)
    arguments = ["--label", "y", "--score", "score", "--groups", "region", "sex"]
    assert main([str(tmp_path / name), *arguments]) == main([file(), *arguments])
    first, second = capsys.readouterr().out.split("Bias audit")[1:]
    assert first.splitlines()[0] == second.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "yy", "--pred", "pred", "--groups", "sex"], "no column 'yy'"),
        (["--label", "y", "--pred", "region", "--groups", "sex"], "y_pred must be 0/1"),
        (["--label", "y", "--pred", "pred", "--groups", "score"], "more than max_groups"),
        (["--label", "y", "--pred", "pred", "--groups", "sex", "--metrics", "acc"], "did you mean"),
        (["--label", "y", "--pred", "pred", "--groups", "sex", "--tolerance", "7"], "tolerance"),
    ],
)
def test_what_cannot_be_used_exits_with_two(file, capsys, arguments, message):
    assert main([file(), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_missing_arguments_and_files_exit_with_two(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["p.csv", "--label", "y", "--groups", "g"])
    assert stop.value.code == 2
    assert main([str(tmp_path / "no.csv"), "--label", "y", "--pred", "p", "--groups", "g"]) == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "empty.csv").write_text("")
    assert main([str(tmp_path / "empty.csv"), "--label", "y", "--pred", "p", "--groups", "g"]) == 2


def test_files_are_written_and_words_are_labels(file, tmp_path, capsys):
    table = pd.read_csv(file())
    table["y"] = table["y"].map({0: "no", 1: "yes"})
    table["pred"] = table["pred"].map({0: "no", 1: "yes"})
    table.to_csv(tmp_path / "w.csv", index=False)
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html", "csv")}
    command = [str(tmp_path / "w.csv"), "--label", "y", "--pred", "pred", "--pos-label", "yes", "--groups", "region"]
    flags = [word for kind, path in outputs.items() for word in (f"--{kind}", str(path))]
    assert main([*command, *flags, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(outputs["json"].read_text())["verdict"] == "pass"
    assert outputs["html"].read_text().startswith("<!DOCTYPE html>")
    assert "region,count" in outputs["csv"].read_text()


def test_a_reader_that_stops_reading_does_not_change_the_exit_code(file, monkeypatch):
    def closed(result):
        raise SystemExit(1)  # what rich does when the pipe is closed

    monkeypatch.setattr("groundwire_bias_audit.cli.show", closed)
    assert main([file(), "--label", "y", "--pred", "pred", "--groups", "sex"]) == 0


@pytest.mark.slow
def test_it_runs_as_a_module(file):
    command = [sys.executable, "-m", "groundwire_bias_audit", file(gap=0.4), "--label", "y", "--pred", "pred"]
    done = subprocess.run([*command, "--groups", "region", "--control", "sex"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "stands out" in done.stdout


def test_one_question_mark_among_the_labels_is_an_error_and_no_pass(tmp_path, capsys):
    table = predictions(rows=4000, gap=0.3)
    table["y"] = table["y"].astype(str).where(table.index != 7, "?")
    table.to_csv(tmp_path / "p.csv", index=False)
    assert main([str(tmp_path / "p.csv"), "--label", "y", "--pred", "pred", "--groups", "region"]) == 2
    error = capsys.readouterr().err
    assert "'?'" in error
    assert "[0, 1]" in error or "[1, 0]" in error


@pytest.mark.parametrize("twice", [["--pred", "y"], ["--pred", "pred", "--baseline", "pred"]])
def test_a_column_is_not_compared_with_itself(file, capsys, twice):
    assert main([file(), "--label", "y", "--groups", "sex", *twice]) == 2
    assert "with itself" in capsys.readouterr().err


def groups_of(path, *arguments):
    """The groups in the JSON of an audit from the command line, with their rows."""
    out = path.with_suffix(".json")
    main([str(path), "--label", "y", "--pred", "pred", "--groups", "g", "--json", str(out), "--quiet", *arguments])
    return {row["group"][0]: row["count"] for row in json.loads(out.read_text())["by_group"]["g"]}


WORDS = ["NA", "None", "null", "nan", "n/a", "", "01", "1", "001", "1.0", "x"]


def words(path, **options):
    table = pd.DataFrame({"y": [0, 1] * 11, "pred": [0, 1] * 11, "g": WORDS * 2})
    table.to_csv(path, index=False, **options)
    return path


def test_groups_are_the_words_of_the_file(tmp_path):
    assert groups_of(words(tmp_path / "p.csv")) == {word or "unknown": 2 for word in WORDS}
    assert groups_of(words(tmp_path / "q.csv", quoting=csv.QUOTE_ALL)) == {word or "unknown": 2 for word in WORDS}


def test_words_for_missing_values_are_those_that_one_names(tmp_path):
    found = groups_of(words(tmp_path / "p.csv"), "--na", "NA", "n/a")
    assert found == {"unknown": 6} | {word: 2 for word in WORDS if word not in ("NA", "n/a", "")}


def test_a_missing_label_is_an_error_whatever_it_is_called(tmp_path, capsys):
    for word, arguments in (("NA", []), ("", []), ("?", ["--na", "?"])):
        (tmp_path / "p.csv").write_text(f"y,pred,g\n0,0,a\n1,1,b\n{word},1,a\n")
        command = [str(tmp_path / "p.csv"), "--label", "y", "--pred", "pred", "--groups", "g", *arguments]
        assert main(command) == 2
        assert "y_true has 1 missing" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_other_encodings_are_read_when_named_and_named_when_not(tmp_path, capsys, encoding):
    path = tmp_path / "p.csv"
    table = pd.DataFrame({"y": [0, 1] * 40, "pred": [0, 1] * 40, "g": ["Zürich", "Genève"] * 40})
    table.to_csv(path, index=False, encoding=encoding)
    command = [str(path), "--label", "y", "--pred", "pred", "--groups", "g"]
    assert main(command) == 2
    assert ("utf-16" if encoding == "utf-16" else "latin-1") in capsys.readouterr().err
    assert groups_of(path, "--encoding", encoding) == {"Genève": 40, "Zürich": 40}
    assert main([*command, "--encoding", "klingon"]) == 2
    assert "unknown" in capsys.readouterr().err


def test_a_decimal_comma_is_read_when_named_and_named_when_not(file, tmp_path, capsys):
    pd.read_csv(file()).to_csv(tmp_path / "p.csv", index=False, sep=";", decimal=",")
    command = [str(tmp_path / "p.csv"), "--label", "y", "--score", "score", "--groups", "region"]
    assert main(command) == 2
    assert "--decimal ," in capsys.readouterr().err
    assert main([*command, "--decimal", ","]) == main([file(), *command[1:]])


def test_headers_may_hold_separators_in_quotes(file, tmp_path):
    table = pd.read_csv(file()).rename(columns={"region": "where, roughly", "y": "label, true"})
    table.to_csv(tmp_path / "p.csv", index=False, sep=";", quoting=csv.QUOTE_ALL)
    command = [str(tmp_path / "p.csv"), "--label", "label, true", "--pred", "pred", "--groups", "where, roughly"]
    assert main(command) == 0


def test_a_group_with_many_values_is_perhaps_an_amount(file, capsys):
    path = file()
    table = pd.read_csv(path)
    table["age"] = np.arange(len(table)) % 60
    table.to_csv(path, index=False)
    main([path, "--label", "y", "--pred", "pred", "--groups", "age", "sex"])
    error = capsys.readouterr().err
    assert "age has 60 values" in error
    assert "sex" not in error


def test_percentages_are_not_called_logits(file, capsys):
    path = file()
    table = pd.read_csv(path)
    table["score"] *= 100
    table.to_csv(path, index=False)
    assert main([path, "--label", "y", "--score", "score", "--groups", "sex"]) == 2
    error = capsys.readouterr().err
    assert "divide by 100" in error
    assert "logits" not in error


@pytest.mark.parametrize("small", [0, 12])
def test_the_page_carries_what_the_command_line_carries(small, tmp_path, capsys):
    table = predictions(rows=600)
    table.loc[: small - 1, "region"] = "island"
    if small:
        table = table.head(100)
    table.to_csv(tmp_path / "p.csv", index=False)
    command = [str(tmp_path / "p.csv"), "--label", "y", "--pred", "pred", "--groups", "region"]
    code = main([*command, "--html", str(tmp_path / "p.html")])
    assert code == (3 if small else 0)
    page, shown = unescape((tmp_path / "p.html").read_text()), " ".join(capsys.readouterr().out.split())
    result = audit(table["y"], y_pred=table["pred"], sensitive_features=table["region"])
    for text in (result.conclusion, "Not judged: selection_rate"):
        assert text in page
        assert text in shown
    assert ("island (region)" in page) == bool(small)
    assert "dense" not in page
    for word in ("at least", "at most", "too few rows"):
        assert word in page
        assert word in shown
