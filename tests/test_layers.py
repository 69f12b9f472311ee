"""What import-linter cannot see: names of plugins in core's text, and folders that import from themselves."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
SOURCES = [ROOT / "core/src", *ROOT.glob("plugins/*/src")]


def test_no_line_of_core_names_a_plugin():
    """Neither code, nor strings, nor comments."""
    spelled = "|".join(name.replace("_", "[-_ ]?") for name in PLUGINS)
    names = re.compile(rf"(?<![a-z])({spelled})(?![a-z])", re.IGNORECASE)
    assert names.search("groundwire_bias_audit")
    assert names.search("BiasAudit()")
    assert not names.search("grammar of the flow limesome")
    lines = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in (ROOT / "core/src").rglob("*.py")
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if names.search(line)
    ]
    assert not lines


def taken_from_own_package(file, source):
    """What the module ``file`` imports from the ``__init__`` of a package that it lies in, submodules excepted."""
    own = file.relative_to(source).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and (package := tuple((node.module or "").split("."))) == own[: len(package)]
        ):
            folder = source.joinpath(*package)
            names = [
                a.name for a in node.names if not ((folder / a.name).is_dir() or (folder / f"{a.name}.py").exists())
            ]
            if len(package) < len(own) and names:
                yield f"{'.'.join(own)}:{node.lineno} takes {', '.join(names)} from {node.module}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_nothing_imports_from_the_package_that_it_lies_in(source):
    assert [line for file in source.rglob("*.py") for line in taken_from_own_package(file, source)] == []
