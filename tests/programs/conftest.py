"""The programs and what runs them, importable as ``programs_<file>``: names that no other package's tests use."""

import importlib.util
import sys
from pathlib import Path

PROGRAMS = ("vision", "generative", "self_supervised", "language", "graphs", "series", "tabular", "loops")

for name in ("harness", *PROGRAMS, "list"):
    spec = importlib.util.spec_from_file_location(f"programs_{name}", Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[f"programs_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
