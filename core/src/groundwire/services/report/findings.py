"""Collecting findings on all ranks, and writing them down on the first one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from groundwire._lightning import Trainer
from groundwire.records import Finding, Section
from groundwire.run import Run
from groundwire.service import Service
from groundwire.services.report.report import Report, plain_finding
from groundwire.version import __version__

#: One folder for all runs of a Trainer that has no log folder of its own.
_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


class FindingsService(Service):
    """The findings of one run."""

    name = "groundwire-report"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        #: Findings so far; a later one replaces an earlier one of the same plugin, code, stage and epoch.
        self._by_key: dict[tuple[Any, ...], Finding] = {}
        self._directory: Path | None = None
        run.members |= {"findings": self._by_key, "directory": None}

    def start(self) -> None:
        """Decide where to write. ``trainer.log_dir`` is a collective operation, so every rank asks."""
        trainer, settings = self.run.trainer, self.run.settings
        log_dir = trainer.log_dir
        if trainer.fast_dev_run or not settings.report:
            return
        if settings.report_dir is not None:
            self._directory = Path(settings.report_dir)
        elif log_dir is not None and trainer.loggers:
            self._directory = Path(log_dir) / "groundwire"
        else:
            if trainer not in _folders:
                _folders[trainer] = _new_folder(Path(trainer.default_root_dir) / "groundwire")
            self._directory = _folders[trainer]
        self.run.members["directory"] = self._directory

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        """Return the ends of validation, test and training. Later hooks come after the strategy was torn down."""
        return {
            "on_validation_epoch_end": self._validation_epoch_end,
            "on_validation_end": self._validation_end,
            "on_test_epoch_end": lambda *_: self._collect(),
            "on_test_end": lambda *_: self._write(),
            "on_train_end": self._train_end,
        }

    def _validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._collect()

    def _validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.run.function == "validate":
            self._write()

    def _train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._collect()
        self._write()

    def _collect(self) -> None:
        """Ask every plugin, on every rank; numbers are also logged, for checkpoints and schedules to monitor."""
        run, stage = self.run, self.run.stage
        # Findings at the end of training are about the whole of it.
        epoch = run.trainer.current_epoch if run.function == "fit" and stage != "train" else None
        found = list(map(plain_finding, run.hooks.collect("gw_findings", Finding)))
        found = [replace(f, stage=f.stage or stage, epoch=epoch if f.epoch is None else f.epoch) for f in found]
        self._by_key |= {(f.plugin, f.code, f.stage, f.epoch): f for f in found}
        numbers = {f"{f.plugin}/{f.code}": float(f.value) for f in found if _is_number(f.value)}
        if stage == "train":  # Lightning's own logging is over by then
            run.send(numbers)
            return
        for key, value in numbers.items():
            # Whole names: with several loaders, codes hold the loader's index, which Lightning would refuse to add to.
            run.log(key, value, sync_dist=True, add_dataloader_idx=False)

    def _write(self) -> None:
        """Write ``findings.json`` and ``report.html``, if there is something to tell."""
        run = self.run
        if self._directory is None or not run.trainer.is_global_zero:
            return
        sections = list(run.hooks.by_owner("gw_section", Section, findings=list(self._by_key.values())).items())
        if not (sections or self._by_key):
            return
        report = _earlier(self._directory) or Report()
        report.meta.update(_meta(run))
        report.add(self._by_key.values())
        try:
            report.write(self._directory, sections)
        except OSError as error:
            # The training is done: a full disk or a folder without permission must not take it away.
            warnings.warn(f"the report cannot be written to {self._directory}: {error}", stacklevel=2)
            return
        run.hooks.call("gw_report", report=report)


def _new_folder(parent: Path) -> Path:
    """Return a folder named after the time, for one Trainer."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(
        parent / name for name in names if not (parent / name).exists() and parent / name not in _folders.values()
    )


def _earlier(directory: Path) -> Report | None:
    """Return the report of an earlier run in the same folder; one that cannot be read is renamed."""
    file = directory / "findings.json"
    try:
        return Report.read(directory) if file.exists() else None
    except ValueError as error:
        renamed = file.replace(file.with_suffix(".unreadable.json"))
        warnings.warn(f"{error} It is now {renamed}, and a new one is written.", stacklevel=2)
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _meta(run: Run) -> dict[str, Any]:
    return {
        "module": type(run.module).__qualname__,
        "plugins": [getattr(p, "name", type(p).__name__) for p in run.plugins],
        "max_epochs": run.trainer.max_epochs,
        "global_step": run.trainer.global_step,
        "groundwire": __version__,
        "torch": str(torch.__version__),
        "lightning": version("lightning"),
    }
