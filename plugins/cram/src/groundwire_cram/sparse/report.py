"""Report of a sparsified module: what became of each layer, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        name: As in ``named_modules``.
        kind: Class of the original layer.
        shape: Of the weight.
        density: Nonzero weights divided by all.
        batch: Rows (or positions) of the input it was measured with; None if it was not measured.
        dense_bytes: Memory of the dense weight.
        sparse_bytes: Memory of the sparse one, with all that inference needs.
        dense_seconds: Median time of a call of the dense layer.
        sparse_seconds: Median time of a call of the sparse layer.
        speedup: Median over the rounds of dense time divided by sparse time.
        decision: ``"dense"``, ``"csr"`` (MKL), ``"compiled"`` (Numba), ``"gather"`` (Numba, batch 1) or ``"2:4"``.
        reason: Why.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    dense_bytes: int
    sparse_bytes: int
    batch: int | None = None
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    speedup: float | None = None
    decision: str = "dense"
    reason: str = "not measured"


@dataclass(frozen=True)
class SparsityReport:
    """All Linear layers and convolutions of a module.

    Attributes:
        rows: One a layer.
        threads: Those of torch at the time of measuring.
        note: Why there were no compiled kernels, if so.
    """

    rows: tuple[LayerRow, ...]
    threads: int
    note: str = ""

    @property
    def sparse(self) -> tuple[LayerRow, ...]:
        """Rows of layers that became sparse."""
        return tuple(row for row in self.rows if row.decision != "dense")

    def __getitem__(self, name: str) -> LayerRow:
        """Return the row of the layer called ``name``."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer {name!r}; there are {[row.name for row in self.rows]}")

    def __rich__(self) -> Table:
        """Return a table for ``rich.print``."""
        title = f"{len(self.sparse)} of {len(self.rows)} layers sparse ({self.threads} thread(s))"
        caption = f"without compiled kernels: {self.note}" if self.note else None
        table = Table("layer", "shape", "density", "MB dense", "MB sparse", "batch", title=title, caption=caption)
        for heading in ("ms dense", "ms sparse", "speed-up", "now", "why"):
            table.add_column(heading)
        for column in [*table.columns[2:9]]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(*_cells(row))
        return table

    def __str__(self) -> str:
        """Return the table as plain text."""
        text = StringIO()
        Console(file=text, width=160, color_system=None).print(self)
        return text.getvalue()


def _cells(row: LayerRow) -> list[str]:
    seconds = ["" if s is None else f"{1e3 * s:.3g}" for s in (row.dense_seconds, row.sparse_seconds)]
    return [
        row.name or "(the module itself)",
        "x".join(map(str, row.shape)),
        f"{row.density:.3f}",
        f"{row.dense_bytes / 1e6:.3g}",
        f"{row.sparse_bytes / 1e6:.3g}",
        "" if row.batch is None else str(row.batch),
        *seconds,
        "" if row.speedup is None else f"{row.speedup:.2f}",
        row.decision,
        row.reason,
    ]
