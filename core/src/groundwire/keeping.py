"""Collecting findings on all ranks, and writing them down on the first one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from groundwire.types import Finding, Section
from groundwire.version import __version__

if TYPE_CHECKING:
    from groundwire.host import Host
    from groundwire.report import Report

#: One folder for all runs of a Trainer that has no log folder of its own.
_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


class FindingsService:
    """The findings of one run."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._by_key: dict[tuple[Any, ...], Finding] = {}
        self.directory: Path | None = None

    @property
    def all(self) -> list[Finding]:
        """Findings so far; a later one replaces an earlier one of the same plugin, code, stage and epoch."""
        return list(self._by_key.values())

    def ready(self) -> None:
        """Decide where to write. ``trainer.log_dir`` is a collective operation, so every rank asks."""
        trainer, settings = self._host.trainer, self._host.settings
        log_dir = trainer.log_dir
        if trainer.fast_dev_run or not settings.report:
            return
        if settings.report_dir is not None:
            self.directory = Path(settings.report_dir)
        elif log_dir is not None and trainer.loggers:
            self.directory = Path(log_dir) / "groundwire"
        else:
            if trainer not in _folders:
                _folders[trainer] = _new_folder(Path(trainer.default_root_dir) / "groundwire")
            self.directory = _folders[trainer]

    def collect(self) -> None:
        """Ask every plugin, on every rank; numbers are also logged, for checkpoints and schedules to monitor."""
        from groundwire.report.report import plain_finding

        stage = self._host.stage
        # Findings at the end of training are about the whole of it.
        epoch = self._host.trainer.current_epoch if self._host.fn == "fit" and stage != "train" else None
        found = list(map(plain_finding, self._host.hooks.collect("gw_findings", Finding)))
        if stage == "train":
            found += self._host.gradient.findings()
        found = [replace(f, stage=f.stage or stage, epoch=epoch if f.epoch is None else f.epoch) for f in found]
        self._by_key |= {(f.plugin, f.code, f.stage, f.epoch): f for f in found}
        numbers = {f"{f.plugin}/{f.code}": float(f.value) for f in found if _is_number(f.value)}
        if stage == "train":  # Lightning's own logging is over by then
            self.send(numbers)
            return
        for key, value in numbers.items():
            # Whole names: with several loaders, codes hold the loader's index, which Lightning would refuse to add to.
            self._host.log(key, value, sync_dist=True, add_dataloader_idx=False)

    def send(self, metrics: Mapping[str, float]) -> None:
        """Give ``metrics`` to the Trainer's loggers, which write on rank 0 only."""
        for logger in self._host.trainer.loggers if metrics else ():
            logger.log_metrics(dict(metrics), step=self._host.trainer.global_step)

    def write(self) -> None:
        """Write ``findings.json`` and ``report.html``, if there is something to tell."""
        host = self._host
        if self.directory is None or not host.trainer.is_global_zero:
            return
        sections = list(host.hooks.by_owner("gw_section", Section, findings=self.all).items())
        if not (sections or self._by_key):
            return
        # Only here: the page's libraries would slow every import down.
        from groundwire.report import Report

        report = _earlier(self.directory) or Report()
        report.meta.update(_meta(host))
        report.add(self.all)
        try:
            report.write(self.directory, sections)
        except OSError as error:
            # The training is done: a full disk or a folder without permission must not take it away.
            warnings.warn(f"the report cannot be written to {self.directory}: {error}", stacklevel=2)
            return
        host.hooks.call("gw_report", report=report)


def _new_folder(parent: Path) -> Path:
    """A folder named after the time, for one Trainer."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(
        parent / name for name in names if not (parent / name).exists() and parent / name not in _folders.values()
    )


def _earlier(directory: Path) -> Report | None:
    """The report of an earlier run in the same folder; one that cannot be read is moved aside."""
    from groundwire.report import Report

    file = directory / "findings.json"
    try:
        return Report.read(directory) if file.exists() else None
    except ValueError as error:
        aside = file.replace(file.with_suffix(".unreadable.json"))
        warnings.warn(f"{error} It is now {aside}, and a new one is written.", stacklevel=2)
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _meta(host: Host) -> dict[str, Any]:
    return {
        "module": type(host.module).__qualname__,
        "plugins": [getattr(p, "name", type(p).__name__) for p in host.plugins],
        "max_epochs": host.trainer.max_epochs,
        "global_step": host.trainer.global_step,
        "groundwire": __version__,
        "torch": str(torch.__version__),
        "lightning": version("lightning"),
    }
