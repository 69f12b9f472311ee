"""An audit outside of Python: JSON with a versioned schema, and CSV that no spreadsheet runs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from groundwire_bias_audit.audit.gate import Test, conclusion
from groundwire_bias_audit.audit.groups import with_groups
from groundwire_bias_audit.audit.record import AuditRecord

#: Raised when the content of the JSON changes its meaning; additions do not raise it.
SCHEMA = 2
LIMITATIONS = (
    "Verdicts hold for the audited rows and attributes only.",
    "Rows are taken to be independent; repeated persons make intervals and P values too small.",
    "A pass means that no disparity beyond the tolerance was shown, not that there is none; it says which gaps the "
    "data rule out.",
    "Nothing here is a statement about compliance with any law.",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def plain(value: Any) -> Any:
    """``value`` as JSON has it: undefined numbers are null, keys are strings, tuples lists."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of ``frame`` as mappings; the group is a list with one entry for each feature."""
    found = []
    for index, row in zip(frame.index, frame.to_dict("records"), strict=True):
        group = list(index) if isinstance(index, tuple) else [index]
        found.append({"group": plain(group), **plain(_flat(row))})
    return found


def _flat(row: dict[Any, Any]) -> dict[str, Any]:
    return {" ".join(map(str, key)) if isinstance(key, tuple) else str(key): value for key, value in row.items()}


def content(result: AuditRecord) -> dict[str, Any]:
    """Everything that an audit found, as plain values."""
    groups = result.counts.groups
    features = list(result.features)
    marginals = [[name] for name in features] + ([features] if len(features) > 1 else [])
    found: dict[str, Any] = {
        "kind": "groundwire-bias-audit",
        "schema": SCHEMA,
        "verdict": str(result.verdict),
        "task": result.task,
        "targets": plain(list(result.targets)),
        "features": features,
        "control_features": list(groups.names[: groups.controls]),
        "rows": int(result.counts.size.sum()),
        "gate": {k: plain(v) for k, v in asdict(result.gate).items() if k not in ("named", "draws")},
        "conclusion": result.conclusion,
        "tests": [_test(test) for test in result.tests],
        "overall": records(result.to_frame([])),
        "by_group": {" x ".join(names): records(result.to_frame(names)) for names in marginals},
        "intervals": {" x ".join(names): records(_quick(result).intervals(names)) for names in marginals},
        "ci_quantiles": list(result.ci_quantiles),
        "n_boot": _quick(result).n_boot,
        "random_state": result.random_state,
        "empty_combinations": plain([list(g) if isinstance(g, tuple) else [g] for g in result.dropped]),
        "limitations": list(LIMITATIONS),
        "meta": plain(result.meta) | {"versions": versions()},
    }
    if result.task in ("binary", "multilabel"):
        found["impact_ratios"] = {name: records(result.impact_ratios([name])) for name in features}
    if result.comparison is not None:
        comparison = result.comparison
        found["comparison"] = {
            "verdict": str(comparison.verdict),
            "conclusion": conclusion(comparison.tests, comparison.gate),
            "tests": [_test(test) for test in comparison.tests],
            "by_group": {name: records(comparison.to_frame([name])) for name in features},
        }
    return found


def _test(test: Test) -> dict[str, Any]:
    low, high = test.bounds
    values = {f.name: plain(getattr(test, f.name)) for f in fields(test) if f.name != "limits"}
    return values | {"gap_low": plain(low), "gap_high": plain(high)}


def _quick(result: AuditRecord) -> AuditRecord:
    """Of several outputs the file has intervals of the gated rates by 200 draws; the others can be had in Python."""
    if len(result.targets) == 1 or result.task != "multilabel":
        return result
    return replace(result, metrics=tuple(result.gate.metrics or ()), n_boot=min(result.n_boot, 200))


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    found = {}
    for name in ("groundwire-bias-audit", "groundwire", "fairlearn", "torchmetrics", "scikit-learn", "numpy", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def to_json(result: AuditRecord, path: str | Path | None = None) -> str:
    """See :meth:`groundwire_bias_audit.AuditResult.to_json`."""
    text = json.dumps(content(result), indent=2, allow_nan=False) + "\n"
    write_text(text, path)
    return text


def to_csv(frame: pd.DataFrame, path: str | Path | None = None, *, index: bool = True) -> str:
    """``frame`` as CSV; text that starts with = + - @ gets an apostrophe in front, so that no spreadsheet runs it.

    Example:
        >>> print(to_csv(pd.DataFrame({"n": [-1]}, index=pd.Index(["=1+1"], name="group"))).strip())
        group,n
        '=1+1,-1
    """
    safe = (with_groups(frame) if index else frame).copy()
    for i, column in enumerate(safe.columns):
        if not pd.api.types.is_numeric_dtype(safe.dtypes.iloc[i]):
            safe.isetitem(i, [_quoted(value) for value in safe.iloc[:, i]])
        del column
    safe.columns = [_quoted(" ".join(map(str, c)).strip() if isinstance(c, tuple) else str(c)) for c in safe.columns]
    text = str(safe.to_csv(index=False, lineterminator="\n"))
    write_text(text, path)
    return text


def _quoted(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def write_text(text: str, path: str | Path | None) -> None:
    """Write ``text`` to ``path``, if there is one."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
