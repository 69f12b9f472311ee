"""Filter of a training loader: read, compare on rank 0, remember, and tell all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from groundwire import Fields, PluginError, TrainData
from groundwire_flea.inputs.dataset import DatasetReader, plain_values
from groundwire_flea.inputs.embedding import resolve_embed
from groundwire_flea.result import FLEAWarning, SavedResult, source_hash
from groundwire_flea.selection import clean_count
from groundwire_flea.selector import filter_sources

#: Arguments that a resumed run cannot change any more.
DECISIVE = ("fairness", "append_sensitive", "always_keep", "count_copies_once", "keep_unsuspicious")


@dataclass(frozen=True)
class LoaderFilter:
    """Filter of the rows of a training loader.

    Attributes:
        source: See :class:`groundwire_flea.FLEA`.
        groups: See there.
        embed: See there.
        max_rows: Rows of a source to compare at most.
        options: Arguments of :func:`groundwire_flea.filter_sources`.
    """

    source: Any = None
    groups: Any = None
    embed: Any = None
    max_rows: int | None = 2000
    options: dict[str, Any] = field(default_factory=dict)

    def decide(
        self, trainer: Any, loader: Any, saved: SavedResult | None, fields: Callable[[Any], Fields], module: Any
    ) -> tuple[SavedResult, list[Any]]:
        """The result, computed on rank 0 or ``saved`` before, and the source of every row; alike on all ranks.

        Raises:
            PluginError: On all ranks: the data cannot be read, compared, or do not fit the saved result.
            What the user's own code raised is raised as it is on rank 0.
        """
        answer: tuple[Any, ...] = ()
        failure: Exception | None = None
        if trainer is None or trainer.is_global_zero:
            progress = trainer is not None and trainer.progress_bar_callback is not None
            try:
                answer = self._on_rank_zero(loader, saved, fields, module, progress)
            except Exception as raised:  # the other ranks must hear of it first
                failure, answer = raised, (None, None, f"flea: rank 0 failed: {type(raised).__name__}: {raised}")
        if trainer is not None:
            answer = trainer.strategy.broadcast(answer, src=0)
        if failure is not None:
            raise failure
        state, rows, error = answer
        if error is not None:
            raise PluginError(error)
        return SavedResult.from_state(state), rows

    def _on_rank_zero(
        self, loader: Any, saved: SavedResult | None, fields: Callable[[Any], Fields], module: Any, progress: bool
    ) -> tuple[Any, Any, str | None]:
        """State and rows, or an error as text: raised on rank 0 alone, it would leave the others waiting."""
        try:
            refuse_unreadable(loader)
            reader = DatasetReader(self.source, self.groups, fields, resolve_embed(self.embed, module))
            if saved is None:
                result, rows = self._compare(reader, loader, progress)
            else:
                result, rows = saved, known_sources(reader, loader, saved)
                self._warn_of_other_arguments(saved)
        except (ValueError, TypeError, PluginError) as error:
            return None, None, f"flea: {str(error).removeprefix('flea: ')}"
        return result.state(), rows, None

    def _compare(self, reader: DatasetReader, loader: DataLoader[Any], progress: bool) -> tuple[SavedResult, list[Any]]:
        read, rows = reader.read(loader, self.max_rows, self.options.get("random_state", 0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = filter_sources(
                read.x,
                read.y,
                sensitive_features=read.groups,
                sources=read.sources,
                max_rows_per_source=self.max_rows,
                progress=progress,
                **self.options,
            )
        for warning in caught:
            warnings.warn(f"flea: {warning.message}", FLEAWarning, stacklevel=2)
        return SavedResult.of(result, rows, self._decisive_options()), rows

    def _decisive_options(self) -> dict[str, Any]:
        """Arguments on which the decision depends, but not K, in plain types."""
        given = {name: self.options[name] for name in DECISIVE if name in self.options}
        return {name: plain_values(v) if name == "always_keep" else v for name, v in given.items()}

    def _warn_of_other_arguments(self, saved: SavedResult) -> None:
        """Tell that the decision of a checkpoint stays, although it would be another one with today's arguments."""
        for name, value in self._decisive_options().items():
            if name in saved.options and value != saved.options[name]:
                text = (
                    f"flea: {name} is {value!r} now, but the decision was made with {saved.options[name]!r} and stays "
                    "-> start a new fit from the weights alone to decide again"
                )
                warnings.warn(text, FLEAWarning, stacklevel=2)
        once = bool(saved.options.get("count_copies_once", False))
        copies = sum(len(copies) - 1 for copies in saved.copies) if once else 0
        now = clean_count(self.options.get("n_clean"), len(saved.sources) - copies)
        if now != saved.n_clean:
            text = (
                f"flea: n_clean now means {now} sources, but the decision was made for {saved.n_clean} and stays -> "
                "start a new fit from the weights alone to decide again"
            )
            warnings.warn(text, FLEAWarning, stacklevel=2)


def refuse_unreadable(loader: Any) -> None:
    """Raise before anything is read if rows could not be chosen anyway.

    Raises:
        PluginError: ``loader`` is no DataLoader, or its data set has no rows by number.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        if loader.batch_sampler is None:
            raise PluginError(
                "flea: a DataLoader with batch_size=None does not say what one row of its data set is -> give it a "
                "batch_size, and a data set of single rows"
            )
        return
    what = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
    raise PluginError(
        f"flea: the training rows of a {what} cannot be read by number -> use one DataLoader with a map-style data "
        "set; several data sets fit into one as SourceDatasets({'name': data set, ...})"
    )


def known_sources(reader: DatasetReader, loader: DataLoader[Any], saved: SavedResult) -> list[Any]:
    """Return the sources of all rows, which the saved result must know.

    Raises:
        PluginError: A source is new.
    """
    rows = reader.sources(loader)
    unseen = saved.unseen(rows)
    if unseen:
        raise PluginError(
            f"the training data have sources that the checkpoint's decision does not know: "
            f"{', '.join(map(repr, unseen[:5]))}; it knows {', '.join(map(repr, saved.sources))} -> resume with the "
            "same sources, or start a new fit from the weights alone"
        )
    if source_hash(rows) != saved.hash:
        text = "flea: the rows are not those of the checkpoint's decision, which is used for their sources all the same"
        warnings.warn(text, FLEAWarning, stacklevel=2)
    return rows


def apply_result(result: SavedResult, rows: list[Any], mode: str, data: TrainData) -> None:
    """Choose or weight the rows, unless that changes nothing."""
    if mode == "report" or all(result.kept):
        return
    if mode == "filter":
        data.keep(np.flatnonzero(result.keeps(rows)).tolist())
    else:
        data.weights(result.weights(rows).tolist())
