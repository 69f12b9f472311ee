"""The tests of core, each time with one service taken out; those that are about it, or need it, are left out.

python core/tests/without_service.py            every service in turn
python core/tests/without_service.py scores     one of them; what follows goes to pytest
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SRC = HERE.parent / "src" / "groundwire"

#: What each service's absence takes away: files (or single tests, by a part of their name) that are about it.
NEEDED_BY = {
    "gradient": (
        "services/gradient", "test_gradients.py", "test_replay.py", "test_replay_manual.py", "test_replay_once.py",
        "test_traces.py", "test_traces_of_state.py", "test_window.py", "test_ddp.py", "test_testing_kit.py",
        "test_testing_kit_resume.py", "test_batch_start.py", "test_resting.py", "test_run.py",
    ),
    "scores": (
        "services/scores", "test_scores.py", "test_head.py", "test_batch_start.py", "test_batch_start_guards.py",
        "test_resting.py", "test_evaluation.py", "test_run_services.py", "test_training_rows.py",
    ),
    "model": ("services/model.py", "test_transform.py", "test_checkpoint.py", "test_testing_kit.py"),
    "rows": ("services/rows.py", "test_training_rows.py"),
    "sample_ids": ("services/sample_ids.py", "test_training_rows.py"),
    "variants": ("services/variants.py", "test_evaluation.py", "test_batch_start.py", "test_ddp.py"),
    "checkpoint": (
        "services/checkpoint", "test_checkpoint.py", "test_testing_kit.py", "test_testing_kit_leftovers.py",
        "test_cli.py", "test_batch_start.py", "test_traces.py",
    ),
    "report": (
        "services/report", "cli/report.py", "test_findings.py", "test_report.py", "test_report_browser.py",
        "test_report_extra.py", "test_report_figures.py", "test_report_page.py", "test_plain_values.py", "test_cli.py",
        "test_ddp.py", "test_evaluation.py", "test_batch_start.py", "test_gradients.py", "test_run_services.py",
        "test_run.py", "test_traces.py",
    ),
}  # fmt: skip


def run(service, arguments):
    """Run the tests that remain; the exit status of pytest."""
    needing = [*NEEDED_BY[service], "test_services_removable.py"]
    ignored = [option for part in needing for option in ("--ignore", str((SRC if "/" in part else HERE) / part))]
    command = [sys.executable, "-m", "pytest", "-q", HERE.parent, *ignored, *arguments]
    return subprocess.run(command, env={**os.environ, "WITHOUT_SERVICE": service}, check=False).returncode


if __name__ == "__main__":
    named = [name for name in sys.argv[1:] if name in NEEDED_BY]
    rest = [argument for argument in sys.argv[1:] if argument not in NEEDED_BY]
    failed = []
    for service in named or NEEDED_BY:
        print(f"without {service}:", flush=True)
        if run(service, rest):
            failed.append(service)
    print(f"failed without: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))
