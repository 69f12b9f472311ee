"""Without the libraries of ``groundwire[report]`` a run trains, writes findings, and says how to get the page."""

import subprocess
import sys

import pytest

from groundwire import Finding, Plugin, Report, Section, hookimpl
from groundwire.services.report import page

CODE = """
import sys
import lightning.pytorch  # whose own libraries use some of these
for name in ("jinja2", "markupsafe", "matplotlib"):
    sys.modules[name] = None
import groundwire, groundwire.cli.app, groundwire.host
from groundwire import Finding, Report
report = Report({"module": "Net"})
report.add([Finding("mine", "sparsity", "info", 0.5, "Half is zero.")])
report.write(sys.argv[1])
report.write(sys.argv[1])
assert Report.read(sys.argv[1]).path.name == "findings.json"
assert groundwire.cli.app.main(["report", sys.argv[1]]) == 0
"""


@pytest.mark.slow
def test_core_is_whole_without_jinja2_and_matplotlib(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('pip install "groundwire[report]"') == 2
    assert [path.name for path in tmp_path.iterdir()] == ["findings.json"]


def test_a_run_without_them_writes_findings_and_says_one_line(kit, monkeypatch, caplog):
    class Finds(Plugin):
        @hookimpl
        def gw_findings(self, run):
            return [Finding("finds", "one", "info", 1, "One.")]

        @hookimpl
        def gw_section(self, findings):
            return Section("One")

        @hookimpl
        def gw_report(self, report):
            self.path = report.path

    monkeypatch.setitem(sys.modules, "jinja2", None)
    finds = Finds()
    with caplog.at_level("WARNING", "groundwire"):
        kit.fit(kit.Net(), finds)
    [record] = [r for r in caplog.records if r.name.startswith("groundwire")]
    assert 'pip install "groundwire[report]"' in record.message
    assert finds.path.name == "findings.json"
    assert Report.read(finds.path).findings[0].code == "one"
    assert issubclass(page.NoPageError, ImportError)
