"""The outcomes of the checks of one plugin."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Status: TypeAlias = Literal["passed", "not applicable", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check.

    Attributes:
        name: The check.
        status: ``"passed"``, ``"not applicable"``, ``"skipped"`` or ``"failed"``.
        reason: Why it does not apply, was skipped or failed; for a passed one, what was left out.

    Example:
        >>> print(Outcome("second_fit", "passed"))
        passed          second_fit
    """

    name: str
    status: Status
    reason: str = ""

    def __str__(self) -> str:
        label = self.status.upper() if self.status == "failed" else self.status
        return f"{label:<16}{self.name}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class CheckReport:
    """The outcomes of all checks of a plugin; ``print`` it.

    Attributes:
        plugin: Name of the plugin's class.
        outcomes: One for each check, in the order in which they ran.

    Example:
        >>> report = CheckReport("Mine", (Outcome("second_fit", "skipped", "one fit only"),))
        >>> report["second_fit"].status, report.failed
        ('skipped', ())
        >>> print(report)
        Mine: 0 passed, 0 not applicable, 1 skipped, 0 failed
          skipped         second_fit: one fit only
    """

    plugin: str
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The outcomes of the checks that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def __getitem__(self, name: str) -> Outcome:
        """The outcome of the check called ``name``.

        Raises:
            KeyError: No such check ran.
        """
        return {outcome.name: outcome for outcome in self.outcomes}[name]

    def __str__(self) -> str:
        counts = Counter(outcome.status for outcome in self.outcomes)
        head = ", ".join(f"{counts[status]} {status}" for status in get_args(Status))
        return "\n".join([f"{self.plugin}: {head}", *(f"  {outcome}" for outcome in self.outcomes)])
