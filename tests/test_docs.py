"""The code in the documentation runs as it stands there, and what its shell lines call exists."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from groundwire.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "core/README.md", *ROOT.glob("plugins/*/README.md"), *ROOT.glob("docs/*.md")]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block; one with a title is a file of that name."""

    page: Path
    line: int
    language: str
    title: str | None
    code: str


def blocks(page):
    text = page.read_text("utf-8")
    return [Block(page, text[: m.start()].count("\n") + 2, *m.groups()) for m in FENCE.finditer(text)]


def python_blocks(page):
    return [block for block in blocks(page) if block.language == "python" and not block.title]


def named(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def commands(page):
    """Each shell line of ``page`` as a list of words, comments left out."""
    lines = [line for b in blocks(page) if b.language in SHELL for line in b.code.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of its own, in which a page's files can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write_files(page, folder):
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.code)


@pytest.mark.parametrize("page", named(p for p in PAGES if "```python" in p.read_text("utf-8")))
def test_python_blocks_run_in_order(page, folder):
    write_files(page, folder)
    namespace = {"__name__": "page"}
    for block in python_blocks(page):
        code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", named(p for p in PAGES if "```diff" in p.read_text("utf-8")))
def test_both_sides_of_a_diff_run(page, folder):
    for block in (b for b in blocks(page) if b.language == "diff"):
        for side in "-+":
            lines = [line[1:] for line in block.code.splitlines() if line[:1] in (" ", side)]
            assert len(lines) < len(block.code.splitlines())
            exec("\n".join(lines), _names_of_a_diff())


def _names_of_a_diff():
    """What the before/after of a Trainer takes for granted."""

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch):
            return self.layer(batch[0]).square().mean()

        def validation_step(self, batch):
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=4)
    return {"model": Model(), "train_loader": loader, "val_loader": loader}


SCRIPTS = [
    pytest.param(page, words, id=" ".join(words))
    for page in PAGES
    for words in commands(page)
    if words[0] == "python" and words[1].endswith(".py")
]


@pytest.mark.parametrize(("page", "words"), SCRIPTS)
def test_scripts_of_a_page_run_as_its_shell_lines_say(page, words, folder, monkeypatch):
    write_files(page, folder)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI calls what jsonargparse deprecated
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # without one Lightning warns that it takes 0
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(words[1], run_name="__main__")


@pytest.mark.parametrize("page", named(p for p in PAGES if 'title="test_' in p.read_text("utf-8")))
def test_test_files_of_a_page_pass(page, folder):
    """They import ``my_plugin``: what the page's first two blocks define."""
    write_files(page, folder)
    (folder / "my_plugin.py").write_text("\n".join(block.code for block in python_blocks(page)[:2]))
    found = [item for file in folder.glob("test_*.py") for item in runpy.run_path(str(file)).items()]
    tests = [function for name, function in found if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.parametrize("page", named([*PAGES, ROOT / "CONTRIBUTING.md"]))
def test_commands_exist(page):
    text = page.read_text("utf-8")
    called = {words[1] for words in commands(page) if words[0] == "groundwire"}
    called |= set(re.findall(r"`groundwire ([a-z]+)", text))
    assert called <= set(COMMANDS)
    targets = set(re.findall(r"make ([a-z]+)", " ".join(re.findall(r"`[^`\n]+`", text))))
    targets |= {words[1] for words in commands(page) if words[0] == "make"}
    makefile = ROOT / "Makefile"
    assert not makefile.exists() or targets <= set(re.findall(r"^([\w-]+):", makefile.read_text("utf-8"), re.MULTILINE))


def test_this_file_sees_the_blocks():
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) == sum(page.read_text("utf-8").count("\n```") // 2 for page in PAGES)
    assert {"python", "yaml", "sh", "diff"} <= {block.language for block in found}
    assert SCRIPTS
