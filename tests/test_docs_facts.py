"""What the documentation states about the packages agrees with them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import groundwire
import groundwire_cram
from groundwire import specs
from groundwire.batch import KEYS
from groundwire.specs import HOOKS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "core/README.md")),
    *ROOT.glob("plugins/*/README.md"),
    *ROOT.glob("docs/*.md"),
]
EVERY_PAGE = pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
PROJECTS = [ROOT / "core/pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]


def section_of(hook):
    """The part of hooks.md under the hook's heading."""
    text = (ROOT / "docs/hooks.md").read_text("utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    found = [part for part in parts if part.startswith(f"{hook}\n")]
    assert len(found) == 1, f"{hook} has {len(found)} headings in docs/hooks.md"
    return found[0]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_page_agrees_with_the_specification(hook):
    spec, section = getattr(specs, hook), section_of(hook)
    doc = inspect.getdoc(spec)
    kind = "first result" if spec.groundwire_spec["firstresult"] else "collect"
    since = re.search(r"versionadded:: (.+)", doc)[1]
    signature, stated_kind, stated_since = section.splitlines()[2].split(" · ")
    assert signature == f"`{hook}({', '.join(HOOKS[hook])})`"
    assert stated_kind.split(",")[0] == kind
    assert stated_since == f"since {since}"
    assert doc.split(". ")[0].split(".\n")[0] + "." in section


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_when_and_what_may_be_changed(hook):
    section = section_of(hook)
    for word in ("Called", "May change", "Returns"):
        assert f"* **{word}:**" in section
    assert f"(#{hook})" in (ROOT / "docs/hooks.md").read_text("utf-8")


def test_hooks_page_has_no_hook_of_its_own():
    headings = re.findall(r"^## (gw_\w+)$", (ROOT / "docs/hooks.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(HOOKS)
    assert f"complete for `SPEC_VERSION` {groundwire.SPEC_VERSION}" in (ROOT / "docs/hooks.md").read_text("utf-8")


def test_hooks_page_lists_the_default_keys():
    for role, keys in KEYS.items():
        assert f"| {role} | {', '.join(f'`{key}`' for key in keys)} |" in section_of("gw_fields")


@pytest.mark.parametrize("name", ["groundwire", *(path.parent.name for path in PROJECTS[1:])])
def test_every_public_name_is_on_the_api_page(name):
    package = importlib.import_module(name if name == "groundwire" else f"groundwire_{name}")
    text = (ROOT / "docs/api.md").read_text("utf-8")
    missing = [n for n in package.__all__ if not re.search(rf"\b{package.__name__}\.{re.escape(n)}\b", text)]
    assert not missing


@pytest.mark.parametrize("page", ["docs/cram.md", "plugins/cram/README.md"])
def test_the_arguments_of_cram_are_those_of_its_tables(page):
    text = (ROOT / page).read_text("utf-8")
    stated = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    actual = inspect.signature(groundwire_cram.CrAM).parameters
    assert stated == {name: str(parameter.default) for name, parameter in actual.items()}


@EVERY_PAGE
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file), target


def _anchors(file):
    headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@EVERY_PAGE
def test_no_path_of_one_machine_and_no_address_of_an_index(page):
    text = page.read_text("utf-8")
    assert not re.search(r"(?<![\w.])(/(tmp|home|root|work|opt|mnt|Users)/|[A-Z]:\\)", text)
    assert not re.search(r"index-url|localhost|127\.0\.0\.1|find-links", text)


def test_all_packages_have_one_version():
    projects = [tomllib.loads(path.read_text("utf-8"))["project"] for path in PROJECTS]
    versions = {project["name"]: project["version"] for project in projects}
    assert set(versions.values()) == {groundwire.__version__}
    plugins = {f"{name}=={version}" for name, version in versions.items() if name != "groundwire"}
    assert set(projects[0]["optional-dependencies"]["all"]) == plugins
    for project in projects[1:]:
        assert f"groundwire[report]=={groundwire.__version__}" in project["dependencies"]
    assert groundwire.__version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_package_is_in_the_table_of_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    for path in PROJECTS:
        assert f"| `{tomllib.loads(path.read_text('utf-8'))['project']['name']}` |" in text


def test_plugins_take_from_core_only_what_the_api_page_names():
    named = set(re.findall(r"^::: groundwire\.(\S+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE))
    homes = {f"{groundwire._HOME[name]}.{name}" for name in groundwire.__all__ if name in groundwire._HOME}
    for file in ROOT.glob("plugins/*/src/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("groundwire."):
                used = {f"{node.module.removeprefix('groundwire.')}.{alias.name}" for alias in node.names}
                assert used <= named | homes, f"{file.relative_to(ROOT)} uses {used - named - homes}"
