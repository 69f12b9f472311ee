"""``python -m groundwire_bias_audit predictions.csv ...``: an audit of a file, with an exit code for scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from groundwire_bias_audit.api import audit
from groundwire_bias_audit.audit.gate import Gate, Verdict
from groundwire_bias_audit.output.console import show
from groundwire_bias_audit.result import AuditResult

EXIT_CODES = {Verdict.PASS: 0, Verdict.DISPARITY: 1, Verdict.INSUFFICIENT: 3}
USAGE = 2
_CODES = "Exit code: 0 pass, 1 disparity, 2 the input cannot be used, 3 insufficient data."


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        "python -m groundwire_bias_audit",
        description="Audit predictions in a CSV or Parquet file by group.",
        epilog=_CODES,
    )
    made.add_argument("file", type=Path, help="one row a sample; .csv, or .parquet where pyarrow is installed")
    made.add_argument("--label", required=True, nargs="+", metavar="COLUMN", help="true labels; several for multilabel")
    given = made.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--score", nargs="+", metavar="COLUMN", help="P(label = 1), or one column for each class or label"
    )
    given.add_argument("--pred", nargs="+", metavar="COLUMN", help="hard predictions, in the form of the labels")
    made.add_argument("--groups", required=True, nargs="+", metavar="COLUMN", help="sensitive features")
    made.add_argument("--control", nargs="+", metavar="COLUMN", help="compare groups within the values of these")
    made.add_argument("--weight", metavar="COLUMN", help="sample weights")
    made.add_argument(
        "--baseline", nargs="+", metavar="COLUMN", help="the model before, in the form of --score or --pred"
    )
    made.add_argument(
        "--task", choices=("binary", "multiclass", "multilabel", "regression"), help="guessed if left out"
    )
    made.add_argument("--threshold", type=float, default=0.5, help="predicted 1 where score >= this (default: 0.5)")
    made.add_argument("--pos-label", help="the positive label, where labels are words")
    made.add_argument("--logits", action="store_true", help="the scores are logits")
    made.add_argument("--tolerance", type=float, default=0.05, help="largest gap that is accepted (default: 0.05)")
    made.add_argument("--alpha", type=float, default=0.05, help="chance of a false alarm (default: 0.05)")
    made.add_argument("--metrics", nargs="+", metavar="RATE", help="gated rates (default: accuracy, TPR and FPR)")
    made.add_argument("--min-count", type=int, default=30, help="rows that each denominator needs (default: 30)")
    made.add_argument("--correction", default="holm", help="holm, bh or none (default: holm)")
    made.add_argument("--intersections", action="store_true", help="also gate the crossing of all groups")
    made.add_argument("--max-groups", type=int, default=100, help="most values of a feature (default: 100)")
    made.add_argument("--seed", type=int, default=0, help="of bootstrap and permutations (default: 0)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    made.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    made.add_argument("--csv", type=Path, metavar="FILE", help="write the metrics by group")
    made.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code.
    """
    options = parser().parse_args(arguments)
    try:
        result = _audited(options)
        for path, write in (
            (options.json, result.to_json),
            (options.html, result.to_html),
            (options.csv, result.to_csv),
        ):
            if path is not None:
                write(path)
        verdict = result.verdict
    except (ValueError, TypeError, OSError, ImportError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    if not options.quiet:
        # A reader that stops reading (`| head`) makes rich exit with 1, which would mean a disparity here.
        with suppress(BrokenPipeError, SystemExit):
            show(result)
    return EXIT_CODES[verdict]


def _audited(options: argparse.Namespace) -> AuditResult:
    table = _read(options.file)
    used = [*options.label, *(options.score or options.pred), *options.groups, *(options.control or [])]
    used += [*(options.baseline or []), *([options.weight] if options.weight else [])]
    _known(used, table, options.file)
    compared = (
        [*options.label, *(options.score or options.pred)],
        [*(options.score or options.pred), *(options.baseline or [])],
    )
    for columns in compared:
        twice = [name for name in dict.fromkeys(columns) if columns.count(name) > 1]
        if twice:
            raise ValueError(f"the column {twice[0]!r} would be compared with itself -> name another one")
    gate = Gate(
        tolerance=options.tolerance, alpha=options.alpha, metrics=options.metrics, min_count=options.min_count,
        correction=options.correction, intersections=options.intersections,
    )  # fmt: skip
    given = _columns(table, options.score or options.pred)
    before = None if options.baseline is None else _columns(table, options.baseline)
    kind = ("scores", "baseline_scores") if options.score else ("y_pred", "baseline_pred")
    names = options.label if len(options.label) > 1 else None
    if names is None and options.score is not None and len(options.score) > 2:
        names = _classes(options.score, table[options.label[0]])
    result = audit(
        _columns(table, options.label),
        **{kind[0]: given, kind[1]: before},
        sensitive_features=table[options.groups],
        control_features=None if options.control is None else table[options.control],
        sample_weight=None if options.weight is None else table[options.weight].to_numpy(),
        gate=gate, task=options.task, threshold=options.threshold, from_logits=options.logits,
        pos_label=_pos_label(options, table), target_names=names, max_groups=options.max_groups,
        random_state=options.seed,
    )  # fmt: skip
    result.meta["file"] = options.file.name
    return result


def _classes(columns: Sequence[str], labels: pd.Series) -> list[Any]:
    """Names of the classes: 0, 1, ... for numbers, else the score columns, which must be named as the labels."""
    return list(range(len(columns))) if pd.api.types.is_numeric_dtype(labels.dtype) else list(columns)


def _pos_label(options: argparse.Namespace, table: pd.DataFrame) -> Any:
    """The label as the file has it: ``1`` of a column of numbers is a number."""
    if options.pos_label is None:
        return None
    column = table[options.label[0]]
    if pd.api.types.is_bool_dtype(column.dtype):
        return options.pos_label.lower() in ("true", "1", "yes")
    return float(options.pos_label) if pd.api.types.is_numeric_dtype(column.dtype) else options.pos_label


def _columns(table: pd.DataFrame, names: Sequence[str]) -> Any:
    return table[names[0]].to_numpy() if len(names) == 1 else table[list(names)].to_numpy()


def _known(names: Sequence[str], table: pd.DataFrame, file: Path) -> None:
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"{file} has no column {unknown[0]!r}; it has {', '.join(map(str, table.columns))}")


def _read(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if file.suffix.lower() in (".parquet", ".pq"):
        return pd.read_parquet(file)
    try:
        return pd.read_csv(file, sep=_separator(file))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as CSV: {error}") from error


def _separator(file: Path) -> str:
    """A semicolon or tab where the first line has no comma, as spreadsheets of many countries write."""
    if file.suffix.lower() not in (".csv", ".tsv", ".txt"):
        return ","  # perhaps compressed
    with file.open(encoding="utf-8") as lines:
        first = lines.readline()
    return next((sep for sep in (",", ";", "\t") if sep in first), ",")
