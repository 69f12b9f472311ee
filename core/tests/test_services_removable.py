"""Any one service of core can be taken out, and the others go on working."""

import subprocess
import sys
from pathlib import Path

import pytest
from core_blocked_service import SERVICES

PROGRAM = Path(__file__).with_name("run_without_service.py")


def test_each_folder_of_services_is_in_the_list():
    import groundwire.services

    [folder] = groundwire.services.__path__
    found = {path.stem for path in Path(folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(SERVICES)


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
def test_the_others_import_fit_validate_and_resume_without_one(service):
    done = subprocess.run([sys.executable, PROGRAM, service], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
