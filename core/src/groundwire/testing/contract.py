"""The contract that every plugin must pass, in one call."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from groundwire.testing.checks.cleanliness import (
    clean_after_exception,
    clean_after_fit,
    copies_hold_nothing,
    evaluation_changes_nothing,
)
from groundwire.testing.checks.distributed import ranks_agree_under_ddp
from groundwire.testing.checks.saving import arguments_round_trip, provenance_loads, resume_equals_uninterrupted
from groundwire.testing.checks.training import (
    alone_equals_bundled,
    both_lightning_packages,
    late_built_model,
    neutral_changes_nothing,
    one_object_in_two_trainers,
    second_fit,
)
from groundwire.testing.isolation import isolated
from groundwire.testing.report import CheckReport, Outcome
from groundwire.testing.subject import NotApplicableError, Subject, ViolationError

Skips: TypeAlias = Mapping[str, str] | Iterable[tuple[str, str]]

#: The checks in the order in which they run, by name.
CHECKS: dict[str, Callable[[Subject], str | None]] = {
    check.__name__: check
    for check in (
        alone_equals_bundled,
        neutral_changes_nothing,
        clean_after_fit,
        clean_after_exception,
        evaluation_changes_nothing,
        copies_hold_nothing,
        late_built_model,
        resume_equals_uninterrupted,
        second_fit,
        one_object_in_two_trainers,
        arguments_round_trip,
        provenance_loads,
        both_lightning_packages,
        ranks_agree_under_ddp,
    )
}


def check_plugin(
    factory: Callable[[], Any],
    *,
    neutral: Callable[[], Any] | None = None,
    module: Callable[[], Any] | None = None,
    skip: Skips = (),
) -> CheckReport:
    """Check that a plugin keeps the contract of groundwire plugins, by training small models with it.

    All checks run, each in a folder of its own and without any installed plugin. The dearest one starts two
    processes. The checks, in order: ``alone_equals_bundled``, ``neutral_changes_nothing``, ``clean_after_fit``,
    ``clean_after_exception``, ``evaluation_changes_nothing``, ``copies_hold_nothing``, ``late_built_model``,
    ``resume_equals_uninterrupted``, ``second_fit``, ``one_object_in_two_trainers``, ``arguments_round_trip``,
    ``provenance_loads``, ``both_lightning_packages``, ``ranks_agree_under_ddp``. "Equal" means bit-equal.

    Args:
        factory: Makes a new plugin, for example ``lambda: SAM(rho=0.1)``.
        neutral: Makes the plugin with arguments that ask for ordinary training.
        module: Makes the LightningModule to train, for plugins that the kit's cannot serve. It brings its own
            ``train_dataloader`` or takes the kit's batches, see :class:`groundwire.testing.Classifier`.
        skip: Checks to leave out, with the reason: ``{"ranks_agree_under_ddp": "gw_check refuses DDP"}``, or pairs.

    Returns:
        What came of each check.

    Raises:
        AssertionError: Checks failed. The text lists all checks, the cause holds the exceptions.
        ValueError: ``skip`` names an unknown check or gives no reason.

    Example:
        >>> from groundwire import Plugin
        >>> class Idle(Plugin): ...
        >>> everything_else = {name: "shown in the documentation" for name in CHECKS if name != "second_fit"}
        >>> check_plugin(Idle, skip=everything_else)["second_fit"].status
        'passed'
    """
    report, errors = run_checks(factory, neutral=neutral, module=module, skip=skip)
    if report.failed:
        raise AssertionError(str(report)) from ExceptionGroup("failed checks", errors)
    return report


def run_checks(
    factory: Callable[[], Any],
    *,
    neutral: Callable[[], Any] | None = None,
    module: Callable[[], Any] | None = None,
    skip: Skips = (),
    only: Iterable[str] = tuple(CHECKS),
) -> tuple[CheckReport, list[Exception]]:
    """:func:`check_plugin` without the raising; ``only`` chooses checks.

    Returns:
        The report, and the exceptions of the failed checks.

    Raises:
        ValueError: As for :func:`check_plugin`.
    """
    reasons = _reasons(skip)
    subject = Subject(factory, Path(), neutral, module)
    outcomes, errors = [], []
    for name in only:
        outcome, error = (Outcome(name, "skipped", reasons[name]), None) if name in reasons else _run(name, subject)
        outcomes.append(outcome)
        errors += [error] if error else []
    return CheckReport(_title(factory), tuple(outcomes)), errors


def _reasons(skip: Any) -> dict[str, str]:
    bare = not isinstance(skip, Mapping) and (isinstance(skip, str) or any(isinstance(entry, str) for entry in skip))
    if bare:
        raise ValueError(f"skip={skip!r} gives no reasons -> give {{check: reason}}")
    reasons = dict(skip)
    for name, reason in reasons.items():
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, 1, 0.0)[0]
            raise ValueError(f"skip names {name!r}, which is no check; did you mean {near!r}? All: {', '.join(CHECKS)}")
        if not reason.strip():
            raise ValueError(f"skip gives no reason for {name!r}")
    return reasons


def _run(name: str, subject: Subject) -> tuple[Outcome, Exception | None]:
    with isolated(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            note = CHECKS[name](replace(subject, directory=Path(folder)))
        except NotApplicableError as why:
            return Outcome(name, "not applicable", str(why)), None
        except Exception as error:
            return Outcome(name, "failed", _described(error)), error
    return Outcome(name, "passed", note or ""), None


def _described(error: Exception) -> str:
    if isinstance(error, ViolationError):
        return str(error)
    # An error of a child process carries the child's whole traceback; its last line says what happened.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if 'Traceback' in str(error) else error}"


def _title(factory: Callable[[], Any]) -> str:
    return type(factory()).__name__
