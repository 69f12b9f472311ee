"""Errors raised when a certificate would not hold. Both are ``ValueError``; nothing is ever assumed instead."""

from __future__ import annotations

from typing import Any


class UnsoundError(ValueError):
    """A setting, a weight or an input for which the promised bound does not hold; the text has what was measured.

    Attributes:
        counterexample: Two inputs whose results lie further apart than a bound allows; None if the reason is another.
    """

    def __init__(self, message: str, *, counterexample: tuple[Any, Any] | None = None) -> None:
        super().__init__(message)
        self.counterexample = counterexample


class UnknownLipschitzError(ValueError):
    """An operation without a known, finite Lipschitz constant; the text names the place and a way out.

    Attributes:
        path: Where it is, as in ``named_modules()`` or the name of a traced operation.

    Example:
        >>> UnknownLipschitzError("net.3", "LayerNorm has no useful constant", "use BatchCentering").path
        'net.3'
    """

    def __init__(self, path: str, message: str, hint: str = "") -> None:
        super().__init__(f"{path or 'the model'}: {message}" + (f" -> {hint}" if hint else ""))
        self.path = path
