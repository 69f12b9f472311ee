"""The memory-bound part of a CrAM step: thresholds, perturbation and combination, by several backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from groundwire_cram.kernels.aten import Aten
from groundwire_cram.kernels.interface import Kernels, Pattern, Selection
from groundwire_cram.kernels.reference import Reference

__all__ = ["BACKENDS", "Kernels", "Pattern", "Selection", "select"]


def _numba() -> Kernels:
    from groundwire_cram.kernels.numba import Numba

    return Numba()


def _triton() -> Kernels:
    from groundwire_cram.kernels.triton import Triton

    return Triton()


#: What ``select`` can be asked for by name.
BACKENDS: dict[str, Callable[[], Kernels]] = {"reference": Reference, "aten": Aten, "numba": _numba, "triton": _triton}


def select(name: str = "auto", tensors: Sequence[Tensor] = ()) -> tuple[Kernels, str]:
    """The backend for ``tensors``, and in a sentence why that one.

    Args:
        name: "auto", or one of BACKENDS.
        tensors: What the kernels are for: their devices, dtypes and sizes decide.

    Raises:
        ValueError: There is no such backend, or it cannot run here or on these tensors.

    Example:
        >>> kernels, reason = select("aten")
        >>> kernels.name, reason
        ('aten', 'backend="aten" was asked for')
    """
    if name == "auto":
        return Aten(), "only stock ATen is there"
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {name!r}")
    return BACKENDS[name](), f'backend="{name}" was asked for'
