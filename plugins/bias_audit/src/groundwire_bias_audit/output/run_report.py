"""The report of a run's audits: the section of the page, and the files next to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from groundwire import RunContext, Section
from groundwire.distributed import gathered
from groundwire_bias_audit.attribution.flip_attributions import FlipAttributions
from groundwire_bias_audit.audit.record import AuditRecord
from groundwire_bias_audit.output import figures
from groundwire_bias_audit.output.export import to_csv, to_json
from groundwire_bias_audit.output.page import frame_table, section
from groundwire_bias_audit.stream.flipped_samples import surest_flips, susceptible_samples
from groundwire_bias_audit.stream.samples import Examples, Samples
from groundwire_bias_audit.stream.scored_rows import LOADER_STEP, ScoredRows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Most rows of a table on the page.
SHOWN = 40
#: Images of flipped samples for each variant.
IMAGES = 8


class RunReport:
    """Content of the page: the latest results, and lists and pictures of samples; no data are kept."""

    def __init__(self) -> None:
        self.results: dict[str, Mapping[str, AuditRecord]] = {}
        self.lists: dict[str, pd.DataFrame] = {}
        self.images: dict[str, tuple[list[Any], list[str]]] = {}
        self.examples: dict[tuple[str, str], list[tuple[Any, str]]] = {}
        self.attributions: dict[str, FlipAttributions] = {}

    def add_examples(self, run: RunContext, examples: Examples, samples: Samples) -> None:
        """Remember samples of the confusion by confidence, if they are images."""
        whole = Examples.merged(gathered(run.trainer, examples))
        self.examples = {}
        for cell, found in whole.cells.items() if run.trainer.is_global_zero else ():
            images = samples.images(example.id for example in found)
            if len(images) < len(found):
                self.examples = {}
                return
            titles = [f"{e.id % LOADER_STEP}: {e.score:.2f}\n{figures.label(e.groups, 16)}" for e in found]
            self.examples[cell] = list(zip(images, titles, strict=True))

    def add_attributions(self, stage: str, pairs: Mapping[str, FlipAttributions]) -> None:
        """Remember attribution pairs by variant."""
        self.attributions = dict(pairs)
        self.lists |= {f"attribution-{stage}-{name}": pair.table() for name, pair in pairs.items()}

    def add_results(
        self,
        run: RunContext,
        results: Mapping[str, AuditRecord],
        rows_by_variant: Mapping[str, ScoredRows | None],
        reference: ScoredRows | None,
        samples: Samples,
        most: int,
    ) -> None:
        """Remember the results of a stage, and ``most`` samples that flipped and that are likely to.

        Every process must call it; only the first one remembers lists.
        """
        self.results[run.stage] = results
        lists = {f"susceptible-{run.stage}": susceptible_samples(run.trainer, rows_by_variant["dense"], most)}
        for name, rows in rows_by_variant.items():
            if results[name].comparison is not None:
                flips = surest_flips(run.trainer, reference, rows, results[name].task, max(most, IMAGES))
                lists[f"flips-{run.stage}-{name}"] = None if flips is None else flips.head(most)
                if flips is not None and run.trainer.is_global_zero:
                    by_index = reference is None or reference.ids is not None
                    self.images[name] = thumbnails(samples, flips.head(IMAGES)) if by_index else ([], [])
        if run.trainer.is_global_zero:
            self.lists |= {name: table for name, table in lists.items() if table is not None}

    def section(self) -> Section | None:
        """The latest stage's section."""
        if not self.results:
            return None
        stage, results = list(self.results.items())[-1]
        made = section(results)
        tables = [*made.tables]
        for name, table in self.lists.items():
            if f"-{stage}" in name and len(table):
                tables.append(
                    frame_table(f"{name.replace('-', ' ', 2)} (first {min(len(table), SHOWN)})", table.head(SHOWN))
                )
        drawn = [
            partial(figures.image_row, images, titles, f"Flipped in variant {figures.label(name)}")
            for name, (images, titles) in self.images.items()
            if images
        ]
        if any(self.examples.values()):
            drawn.append(partial(figures.confusion_examples, self.examples))
        drawn += [partial(_attribution_figure, name, pair) for name, pair in self.attributions.items() if pair.images]
        return Section(f"{made.title} ({stage})", made.text, tables, [*made.figures, *drawn])

    def write(self, name: str, page: Path) -> None:
        """``bias_audit/<stage>-<variant>.json`` and the lists as CSV."""
        folder = page.parent / name
        folder.mkdir(exist_ok=True)
        for stage, results in self.results.items():
            for variant, result in results.items():
                to_json(result, folder / f"{_file(f'{stage}-{variant}')}.json")
        for listed, table in self.lists.items():
            to_csv(table, folder / f"{_file(listed)}.csv", index=False)


def _file(name: str) -> str:
    """``name`` as a file name."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)[:100]


def thumbnails(samples: Samples, flips: pd.DataFrame) -> tuple[list[Any], list[str]]:
    """Images of flipped samples, where the data set holds images."""
    images = samples.images(flips.index)
    titles = [f"{row['id']}: {row['label']}\n{row['before']} to {row['after']}" for row in flips.to_dict("records")]
    return images, titles[: len(images)]


def _attribution_figure(name: str, pair: FlipAttributions) -> Figure:
    note = "" if pair.shift.interpretable else ": uninterpretable without a null model"
    title = f"Attributions ({pair.shift.method}) of samples flipped in variant {figures.label(name)}{note}"
    return figures.attribution_pairs(pair.images, pair.maps, pair.titles, title)
