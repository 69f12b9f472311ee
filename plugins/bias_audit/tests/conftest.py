"""What the tests of the bias audit share: Trainers that write no report unless asked."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from groundwire import Plugin, Plugins

spec = importlib.util.spec_from_file_location("bias_audit_patients", Path(__file__).with_name("patients.py"))
spec.loader.exec_module(sys.modules.setdefault("bias_audit_patients", importlib.util.module_from_spec(spec)))


@pytest.fixture
def kit(kit):
    def trainer(*callbacks, report=False, **options):
        """Drawing a report takes longer than the fits of these tests."""
        plain = bool(callbacks) and all(isinstance(callback, Plugin) for callback in callbacks)
        return kit.trainer(*([Plugins(callbacks, report=False)] if plain and not report else callbacks), **options)

    return SimpleNamespace(**{**vars(kit), "trainer": trainer})
