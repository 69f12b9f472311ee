"""The files of a report on disk, read and written without ever leaving half of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundwire.plain import loads

FOLDER, FINDINGS, PAGE = "groundwire", "findings.json", "report.html"


def locate(path: str | os.PathLike[str]) -> Path:
    """Return the ``findings.json`` that ``path`` means: the file, its folder, or the (default root) folder of the run.

    Raises:
        FileNotFoundError: There is none; the text lists what was looked for.

    Example:
        >>> locate("no/such/run")
        Traceback (most recent call last):
            ...
        FileNotFoundError: No report in no/such/run: looked for ...
    """
    given = Path(path)
    wanted = [given] if given.suffix == ".json" else [given / FINDINGS, given / FOLDER / FINDINGS]
    # Without a log folder, a run writes to a subfolder named after the time; the newest one is meant.
    newest = sorted((given / FOLDER).glob(f"*/{FINDINGS}"), reverse=True)
    for file in [*wanted, *newest]:
        if file.is_file():
            return file
    looked = " and ".join(map(str, wanted))
    raise FileNotFoundError(f"No report in {given}: looked for {looked}. Give the log_dir of a run with plugins.")


def read(file: Path, newest: int) -> dict[str, Any]:
    """Return the content of ``file``, if its schema is one of 1 to ``newest``.

    Raises:
        ValueError: The file is damaged, is no report, or has a newer schema.
    """
    try:
        content = loads(file.read_bytes())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged, it is not JSON ({error}). Run again to write a new one.") from error
    schema = content.get("schema") if isinstance(content, Mapping) else None
    if not isinstance(schema, int) or schema < 1:
        raise ValueError(f"{file} is not a report of groundwire: it has no schema number.")
    if schema > newest:
        hint = "pip install --upgrade groundwire"
        raise ValueError(f"{file} has schema {schema}, and this groundwire reads up to {newest}: {hint}")
    return dict(content)


def write(file: Path, text: str) -> None:
    """Write ``text`` to ``file``; whoever reads it meanwhile sees the old content or the new, never a part."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate in a plugin's message must not cost the whole report.
        draft.write_text(text, encoding="utf-8", errors="replace")
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
