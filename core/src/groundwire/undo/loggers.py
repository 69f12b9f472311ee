"""Loggers that take everything and write nothing, and otherwise look like the user's own.

Lightning's dummy logger has no folder and no class of the user's choosing, and a training step may ask for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_WRITING = ("log_", "save", "finalize", "after_save_checkpoint", "watch", "unwatch", "add_")


class MutedLogger:
    """``logger`` with every method that writes replaced by nothing, and an experiment that swallows everything.

    Example:
        >>> class Logger:
        ...     save_dir = "logs"
        ...     def log_metrics(self, metrics): raise OSError("the disk is full")
        >>> muted = MutedLogger(Logger())
        >>> muted.log_metrics({"a": 1})  # nothing happens
        >>> muted.save_dir, isinstance(muted, Logger)
        ('logs', True)
    """

    def __init__(self, logger: Any) -> None:
        vars(self)["_logger"] = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The logger's own class, for code that asks with ``isinstance``."""
        return type(vars(self)["_logger"])

    def __getattr__(self, name: str) -> Any:
        if name in ("experiment", "run"):
            return Nothing()
        value = getattr(vars(self)["_logger"], name)
        return _nothing if callable(value) and name.startswith(_WRITING) else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Take it and forget it."""


class Nothing:
    """An object of which every attribute, item and call is the same nothing.

    Example:
        >>> with Nothing().config.update({"a": 1}) as nothing:
        ...     list(nothing["b"])
        []
    """

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        """Do nothing."""
        return self

    def __getitem__(self, key: Any) -> Nothing:
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Take it and forget it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take it and forget it."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        """Let errors pass."""


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take anything and do nothing."""
