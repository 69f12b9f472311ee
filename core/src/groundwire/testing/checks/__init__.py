"""The checks, one function each; the name says what must hold, the text of an error how it did not."""

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

__all__ = [  # noqa: RUF022 - in the order in which they run
    "alone_equals_bundled",
    "neutral_changes_nothing",
    "clean_after_fit",
    "clean_after_exception",
    "evaluation_changes_nothing",
    "copies_hold_nothing",
    "late_built_model",
    "resume_equals_uninterrupted",
    "second_fit",
    "one_object_in_two_trainers",
    "arguments_round_trip",
    "provenance_loads",
    "both_lightning_packages",
    "ranks_agree_under_ddp",
]
