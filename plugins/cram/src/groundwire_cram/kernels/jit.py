"""Compiling with Numba: when a function is first called, and kept on disk for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import extending

_njit: Any = numba.njit


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Compile ``function`` without the GIL; keep what was compiled on disk where there is a place to."""
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return _njit(cache=True, **options)(function)
    except RuntimeError:  # Neither the package's folder nor the user's cache folder can be written to.
        return _njit(**options)(function)


def intrinsic(generator: Callable[..., Any], **options: Any) -> Any:
    """Make a function of compiled code, which calls it otherwise than Numba's type hints of its generator say."""
    return extending.intrinsic(**options)(generator) if options else extending.intrinsic(generator)


def overload(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Say what compiled code calls for ``function``, by the types of its arguments."""
    return extending.overload(function, strict=False)
