"""What the tests of AOL share, importable by names that no other package's tests use."""

import importlib.util
import sys
from pathlib import Path

for name in ("operators", "digits_net", "written"):
    spec = importlib.util.spec_from_file_location(f"aol_{name}", Path(__file__).with_name(f"{name}.py"))
    module = sys.modules.setdefault(f"aol_{name}", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
