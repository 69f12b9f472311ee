"""The commands answer fast, run nothing that a checkpoint holds, and say in one line what to do about an error."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from groundwire.cli import main
from groundwire.cli.terminal import clean
from groundwire.discovery import Installed
from groundwire.records import Finding
from groundwire.services.report.report import Report

HOSTILE = "\x1b[31m[bold]red\x07\nnext"


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def plugins(monkeypatch):
    def install(*rows):
        monkeypatch.setattr("groundwire.cli.plugins.installed", lambda check: rows)

    return install


def checkpoint(path, **more):
    content = {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 3,
        "global_step": 120,
        "state_dict": {"net.weight": torch.zeros(10, 4), "net.bias": torch.zeros(10)},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {}},
    }
    torch.save(content | more, path)
    return str(path)


PROVENANCE = {
    "version": "0.1.0",
    "spec_version": 1,
    "plugins": [
        {
            "name": "cram",
            "class": "groundwire_cram.CrAM",
            "dist": "groundwire-cram",
            "version": "0.1.0",
            "init": {"rho": 0.05},
            "facts": {"replays": 120},
        }
    ],
}


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_plugins_lists_them(plugins, capsys):
    plugins(Installed("cram", "groundwire_cram:CrAM", "groundwire-cram", "0.1.0", "found"))
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert [word in out for word in ("cram", "found", "groundwire-cram 0.1.0", "groundwire_cram:CrAM")] == [True] * 4


def test_plugins_says_what_to_install_when_there_is_none(plugins, capsys):
    plugins()
    assert main(["plugins"]) == 0
    assert "pip install" in capsys.readouterr().out


def test_plugins_check_ends_with_1_when_one_fails_and_says_why(plugins, capsys):
    plugins(Installed("bad", "bad:Bad", "groundwire-bad", "1", "failed", "ModuleNotFoundError: No module named 'bad'"))
    assert main(["plugins", "--check"]) == 1
    assert "bad: failed: ModuleNotFoundError: No module named 'bad'" in capsys.readouterr().out


def test_report_prints_the_latest_findings_and_the_page(tmp_path, capsys):
    report = Report()
    report.add([Finding("cram", "sparsity", "info", e / 10, "Half is zero.", "validate", epoch=e) for e in (0, 5)])
    report.add([Finding("audit", "odds", "fail", 0.3, "Above the gate.", "test")])
    report.write(tmp_path / "groundwire")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "cram sparsity" in out
    assert "validate epoch 5" in out
    assert "epoch 0" not in out
    assert "1 fail, 0 warn, 1 info (and 1 earlier)" in out
    assert f"Page: {tmp_path / 'groundwire' / 'report.html'}" in out


def test_report_of_a_wrong_folder_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("groundwire: No report in")
    assert captured.err.count("\n") == 1


def test_hostile_text_reaches_no_terminal(tmp_path, capsys):
    report = Report()
    report.add([Finding(HOSTILE, HOSTILE, "info", HOSTILE, HOSTILE)])
    report.write(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]" in out
    assert clean(HOSTILE) == "\ufffd[31m[bold]red\ufffd next"


def test_show_tells_what_a_checkpoint_holds(tmp_path, capsys):
    assert main(["show", checkpoint(tmp_path / "a.ckpt", groundwire=PROVENANCE)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "Lightning 2.6.6",
        "epoch 3",
        "global step 120",
        "tensors 2",
        "parameters and buffers 50",
        "size of the tensors 200 bytes",
        "callbacks with state ModelCheckpoint{'monitor': None}",
        "groundwire 0.1.0, hooks version 1",
        "cram groundwire_cram.CrAM groundwire-cram 0.1.0 rho: 0.0500 replays: 120",
    ):
        assert expected in lines


@pytest.mark.parametrize("provenance", [None, "text", {}, {"plugins": ["text", {"init": 3}]}, {"plugins": 5}])
def test_show_survives_any_provenance(tmp_path, provenance, capsys):
    assert main(["show", checkpoint(tmp_path / "a.ckpt", groundwire=provenance, callbacks=3, state_dict=None)]) == 0
    assert "groundwire" in capsys.readouterr().out


def test_show_reads_the_old_file_format(tmp_path, capsys):
    path = tmp_path / "old.ckpt"
    torch.save({"pytorch-lightning_version": "1.0"}, path, _use_new_zipfile_serialization=False)
    assert main(["show", str(path)]) == 0
    assert "without groundwire" in capsys.readouterr().out


@pytest.mark.parametrize("new_format", [True, False])
def test_show_runs_nothing_and_names_what_it_refused(tmp_path, capsys, new_format):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    content = {"pytorch-lightning_version": "2.6.6", "callbacks": Runs(str(trace))}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert main(["show", str(path)]) == 2
    err = capsys.readouterr().err
    assert "io.open" in err
    assert "nothing was run" in err
    assert err.count("\n") == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.ckpt", None, "does not exist. Give a checkpoint file"),
        ("empty.ckpt", b"", "is not a checkpoint, or is damaged"),
        ("text.ckpt", b"hello", "is not a checkpoint, or is damaged"),
        ("zip.ckpt", b"PK\x05\x06" + b"\0" * 18, "is not a checkpoint, or is damaged"),
        ("pickle.ckpt", pickle.dumps({"a": 1}), "is not a checkpoint, or is damaged"),
    ],
)
def test_show_of_something_else_is_one_line(tmp_path, capsys, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["show", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_show_of_a_folder_says_so(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_show_of_bare_weights_says_what_is_missing(tmp_path, capsys):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    assert main(["show", str(tmp_path / "weights.pt")]) == 2
    assert "not a checkpoint of Lightning" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["bogus"], ["show"], ["report"], []])
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plugins", "report", "show"])
def test_help_tells_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert {"plugins": "--check", "report": "log_dir", "show": "ModelCheckpoint"}[command] in out


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("groundwire ")


@pytest.mark.parametrize("command", ["plugins", "report"])
def test_the_commands_start_without_torch(command, tmp_path):
    Report().write(tmp_path)
    arguments = [command] + ([str(tmp_path)] if command == "report" else [])
    code = (
        "import sys\nfrom groundwire.__main__ import main\n"
        f"assert main({arguments!r}) == 0\n"
        "print('heavy:', sorted({'torch', 'lightning', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout


def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "groundwire", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 2
    assert done.stderr.startswith("groundwire: No report in")
