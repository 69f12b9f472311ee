"""Plugins are found by metadata; a broken one is shown and never breaks another."""

import importlib
import subprocess
import sys
from importlib.metadata import distributions

import pytest

from groundwire.discovery import Installed, installed, load_plugin
from groundwire.errors import PluginError

GOOD = """
class Good:
    def __init__(self, strength: float = 1.0) -> None:
        if strength < 0:
            raise ValueError("strength must be >= 0")
        self.strength = strength
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder on the path, a way to install into it, and no other plugin in sight."""
    monkeypatch.setattr("groundwire.discovery.distributions", _only(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("GROUNDWIRE_DISABLE", raising=False)

    def install(dist, entry_points, version="1.0", **modules):
        info = tmp_path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return info

    yield install
    for name in [name for name, module in sys.modules.items() if _is_below(module, tmp_path)]:
        del sys.modules[name]


def _only(folder):
    return lambda: distributions(path=[str(folder)])


def _is_below(module, folder):
    return str(getattr(module, "__file__", "")).startswith(str(folder))


def _good(install):
    install("groundwire-good", "[groundwire]\ngood = gw_good:Good\n", gw_good=GOOD)


def _broken(install):
    source = "import a_package_that_nobody_has\n"
    install("groundwire-broken", "[groundwire]\nbroken = gw_broken:Broken\n", gw_broken=source)


def test_a_plugin_is_found_without_importing_it(site):
    _good(site)
    assert installed() == (Installed("good", "gw_good:Good", "groundwire-good", "1.0", "found"),)
    assert "gw_good" not in sys.modules


def test_other_groups_are_not_plugins(site):
    site("another", "[console_scripts]\ngood = gw_good:main\n")
    assert installed() == ()


def test_rows_are_sorted_by_name(site):
    site("groundwire-two", "[groundwire]\nzebra = gw_x:Z\nant = gw_x:A\n")
    assert [row.name for row in installed()] == ["ant", "zebra"]


def test_check_imports_and_a_broken_plugin_breaks_no_other(site):
    _good(site)
    _broken(site)
    broken, good = installed(check=True)
    assert (good.name, good.status, good.reason) == ("good", "ok", "")
    assert (broken.name, broken.status) == ("broken", "failed")
    assert "a_package_that_nobody_has" in broken.reason


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import sys\nsys.exit('leaving')\n", "leaving"),
        ("def Odd(): pass\n", "not a class"),
        ("x = 1\n", "Odd"),
        ("this is no Python\n", "SyntaxError"),
    ],
)
def test_check_says_why_a_plugin_failed(site, source, words):
    site("groundwire-odd", "[groundwire]\nodd = gw_odd:Odd\n", gw_odd=source)
    (row,) = installed(check=True)
    assert row.status == "failed"
    assert words in row.reason


def test_a_malformed_file_is_shown_and_hides_nothing(site):
    _good(site)
    site("groundwire-garbled", "[groundwire]\nno equals sign here\n")
    site("unrelated", "[console_scripts]\nno equals sign here\n")
    site("bare", "").joinpath("METADATA").unlink()
    assert [(row.name, row.status) for row in installed()] == [("good", "found"), ("groundwire-garbled", "failed")]


def test_two_distributions_with_one_name_are_duplicates(site):
    _good(site)
    site("impostor", "[groundwire]\ngood = gw_other:Good\n", version="2.0")
    rows = installed(check=True)
    assert [row.status for row in rows] == ["duplicate", "duplicate"]
    for row in rows:
        assert "groundwire-good 1.0" in row.reason
        assert "impostor 2.0" in row.reason
    with pytest.raises(PluginError, match=r"duplicate.*groundwire-good 1\.0.*impostor 2\.0"):
        load_plugin("good")


def test_the_same_distribution_twice_on_the_path_is_one(site, tmp_path, monkeypatch):
    _good(site)
    monkeypatch.setattr("groundwire.discovery.distributions", lambda: distributions(path=[str(tmp_path)] * 2))
    assert len(installed()) == 1


def test_a_disabled_plugin_is_neither_imported_nor_loaded(site, monkeypatch):
    _good(site)
    _broken(site)
    monkeypatch.setenv("GROUNDWIRE_DISABLE", "other, good,broken")
    assert [row.status for row in installed(check=True)] == ["disabled", "disabled"]
    assert "gw_good" not in sys.modules
    with pytest.raises(PluginError, match=r"disabled.*GROUNDWIRE_DISABLE"):
        load_plugin("good")


def test_load_makes_the_plugin_with_its_arguments(site):
    _good(site)
    assert load_plugin("good").strength == 1.0
    assert load_plugin("good", strength=2.0).strength == 2.0


def test_load_of_an_unknown_name_gives_the_nearest_and_all(site):
    _good(site)
    _broken(site)
    with pytest.raises(PluginError, match="did you mean 'good'") as caught:
        load_plugin("goood")
    assert "Installed: broken, good." in str(caught.value)
    assert "pip install groundwire-<name>" in str(caught.value)


def test_load_of_an_unknown_name_without_any_plugin(site):
    with pytest.raises(PluginError, match="Installed: none"):
        load_plugin("good")


def test_load_of_a_broken_plugin_keeps_the_cause(site):
    _broken(site)
    with pytest.raises(PluginError, match=r"groundwire-broken 1\.0 cannot be imported") as caught:
        load_plugin("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_load_with_wrong_arguments_shows_the_signature(site):
    _good(site)
    with pytest.raises(PluginError, match=r"Good\(strength: float = 1\.0\)") as caught:
        load_plugin("good", strenght=2.0)
    assert "strenght" in str(caught.value)


def test_an_error_of_the_plugin_itself_is_passed_on(site):
    _good(site)
    with pytest.raises(ValueError, match="strength must be >= 0"):
        load_plugin("good", strength=-1.0)


def test_importing_the_module_does_not_import_torch():
    code = "import sys, groundwire.discovery as d; d.installed(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
