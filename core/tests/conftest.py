"""What the tests of core share, importable by names that no other package's tests use."""

import importlib.util
import os
import sys
from pathlib import Path

for name in ("blocked_service", "model_plugins", "plugins_to_check", "recorders", "replaying_twice", "report_values"):
    spec = importlib.util.spec_from_file_location(f"core_{name}", Path(__file__).with_name(f"{name}.py"))
    spec.loader.exec_module(sys.modules.setdefault(f"core_{name}", importlib.util.module_from_spec(spec)))
    if name == "blocked_service" and (service := os.environ.get("WITHOUT_SERVICE")):
        sys.modules["core_blocked_service"].block(service)
