"""``python -m groundwire_bias_audit predictions.csv ...``: an audit of a file, with an exit code for scripts."""

from __future__ import annotations

import argparse
import re
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
#: Missing values in columns of labels, scores and weights.
MISSING = ("#N/A", "N/A", "n/a", "NA", "<NA>", "NaN", "nan", "NULL", "null", "None")
#: A group column with more values than this is perhaps an amount.
MANY = 20
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
    made.add_argument(
        "--na", nargs="+", default=[], metavar="WORD", help="words that stand for a missing value, such as NA or ?"
    )
    made.add_argument(
        "--encoding", default="utf-8-sig", help="of a CSV file, such as latin-1 or utf-16 (default: utf-8)"
    )
    made.add_argument("--decimal", default=".", choices=(".", ","), help="decimal sign of a CSV file (default: .)")
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
        print("\n".join(_hints(result)), end="\n" * bool(_hints(result)), file=sys.stderr)
        # A reader that stops reading (`| head`) makes rich exit with 1, which would mean a disparity here.
        with suppress(BrokenPipeError, SystemExit):
            show(result)
    return EXIT_CODES[verdict]


def _audited(options: argparse.Namespace) -> AuditResult:
    table = _read(options)
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


def _read(options: argparse.Namespace) -> pd.DataFrame:
    file: Path = options.file
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if file.suffix.lower() in (".parquet", ".pq"):
        return pd.read_parquet(file).replace(dict.fromkeys(options.na)) if options.na else pd.read_parquet(file)
    try:
        separator = _separator(file, options.encoding)
        header = list(pd.read_csv(file, sep=separator, encoding=options.encoding, nrows=0))
        values = {*options.label, *(options.score or options.pred), *(options.baseline or []), options.weight}
        # As text, 01 and 1 are two groups, and so are NA and a blank; only a blank is missing unless --na says more.
        text = [name for name in (*options.groups, *(options.control or [])) if name in header and name not in values]
        missing = {name: ["", *options.na, *(MISSING if name not in text else ())] for name in header}
        return pd.read_csv(
            file, sep=separator, encoding=options.encoding, decimal=options.decimal, dtype=dict.fromkeys(text, str),
            keep_default_na=False, na_values=missing,
        )  # fmt: skip
    except LookupError as error:
        raise ValueError(f"--encoding {options.encoding} is unknown: {error}") from error
    except UnicodeError as error:
        raise ValueError(f"{file} is not encoded as {options.encoding} -> {_encoding_hint(file)}") from error
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as CSV: {error}") from error


def _encoding_hint(file: Path) -> str:
    with file.open("rb") as raw:
        start = raw.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        return "it looks like UTF-16: pass --encoding utf-16"
    return "pass --encoding latin-1 (or cp1252), as older programs write, or utf-16"


def _separator(file: Path, encoding: str) -> str:
    """The separator of the first line, outside of quotes: a comma, or a semicolon or tab as many spreadsheets write."""
    if file.suffix.lower() not in (".csv", ".tsv", ".txt"):
        return ","  # perhaps compressed
    with file.open(encoding=encoding) as lines:
        first = re.sub(r'"(?:[^"]|"")*"', "", lines.readline())
    return max((",", ";", "\t"), key=first.count)


def _hints(result: AuditResult) -> list[str]:
    """Advice on group columns with so many values that they may be amounts."""
    counted = zip(result.counts.groups.names, result.counts.groups.levels, strict=True)
    return [
        f"hint: {name} has {len(levels)} values; if it is an amount, bin it first, so that groups have enough rows"
        for name, levels in counted
        if len(levels) > MANY
    ]
