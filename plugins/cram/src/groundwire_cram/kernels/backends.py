"""The choice of a kernel backend: by the device and dtype of the tensors, or forced."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from groundwire_cram.kernels.aten import Aten
from groundwire_cram.kernels.base import Kernels
from groundwire_cram.kernels.compiled import Compiled
from groundwire_cram.kernels.reference import Reference

#: What ``select`` can be asked for by name.
BACKENDS = ("reference", "aten", "numba", "triton")

_forced: list[str] = []


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Context manager in which "auto" means ``name``: for tests and measurements.

    Example:
        >>> with forced("aten"):
        ...     select()[0].name
        'aten'
    """
    check_name(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def check_name(name: str) -> None:
    """Raise if there is no backend of this name, or if it cannot be imported."""
    if name != "auto":
        select(name)


def select(name: str = "auto", tensors: Sequence[Tensor] = ()) -> tuple[Kernels, str]:
    """Return the backend for ``tensors``, and in a few words why that one.

    Args:
        name: "auto", or one of BACKENDS. Automatic is Numba on a CPU and Triton on CUDA, where they can be imported
            and know the dtype of most entries; stock ATen otherwise.
        tensors: What the kernels are for; without any, a CPU is assumed.

    Raises:
        ValueError: There is no such backend, it cannot be imported, or it cannot reach the tensors' device.

    Example:
        >>> kernels, reason = select("aten")
        >>> kernels.name, reason
        ('aten', 'backend="aten" was asked for')
    """
    if name == "auto" and _forced:
        name = _forced[-1]
    if name == "auto":
        return _automatic(tensors)
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, got {name!r}")
    if name in ("reference", "aten"):
        return (Reference() if name == "reference" else Aten()), f'backend="{name}" was asked for'
    kernels = _compiled(name)
    refusal = _refusal(kernels, tensors)
    if refusal and "dtype" not in refusal:
        raise ValueError(f'backend="{name}": {refusal} -> use backend="auto"')
    return kernels, f'backend="{name}" was asked for'


def _automatic(tensors: Sequence[Tensor]) -> tuple[Kernels, str]:
    device = tensors[0].device.type if tensors else "cpu"
    wanted = {"cpu": "numba", "cuda": "triton"}.get(device)
    if wanted is None:
        return Aten(), f"there are no compiled kernels for {device}"
    try:
        kernels = _compiled(wanted)
    except ValueError as error:
        return Aten(), str(error)
    refusal = _refusal(kernels, tensors)
    return (Aten(), refusal) if refusal else (kernels, f"the fastest on {device}")


def _compiled(name: str) -> Compiled:
    try:
        module = importlib.import_module(f"groundwire_cram.kernels.{name}")
    except ImportError as error:
        raise ValueError(f'backend="{name}" cannot be imported here ({error}) -> pip install {name}') from error
    kernels: Compiled = getattr(module, name.capitalize())()
    return kernels


def _refusal(kernels: Compiled, tensors: Sequence[Tensor]) -> str | None:
    """Say why these kernels are not for these tensors."""
    entries: Counter[object] = Counter()
    for t in tensors:
        if t.device.type not in kernels.devices:
            return f"{kernels.name} cannot reach tensors on {t.device.type}"
        entries[t.dtype] += t.numel()
    most = entries.most_common(1)
    return f"{kernels.name} does not have the dtype {most[0][0]}" if most and most[0][0] not in kernels.dtypes else None
