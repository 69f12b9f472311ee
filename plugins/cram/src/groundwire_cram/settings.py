"""The arguments that CrAM as a callback and CrAM as an optimizer have in common."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, Literal, TypeVar, get_type_hints

from groundwire_cram.kernels.backends import check_name
from groundwire_cram.operators import Operator, operators_of
from groundwire_cram.prunable import Skip
from groundwire_cram.threshold import check_sparsity

#: What ``sparsities`` is for a pattern that needs some.
DEFAULT_SPARSITIES = (0.5, 0.7, 0.9)

_Class = TypeVar("_Class", bound=type)


@dataclass(eq=False, repr=False)
class Settings:
    """Settings of a step: how it moves and compresses, and what is drawn for it.

    Args:
        sparsities: Fractions of weights to prune, each in [0, 1); (0.5, 0.7, 0.9) when left out.
        rho: Length of the move, in units of the gradient, at least 0.
        pattern: What is pruned: "global" takes one threshold over all weights, "layerwise" one for each; "2:4",
            "4:8" or any N:M keeps N of M consecutive input channels, "n:m mix" draws 2:4 or 4:8 for each step.
        plus: Add the gradient of the model itself (CrAM+). Without it, plain CrAM.
        sparse_grad: Let pruned entries get no gradient from the compressed model.
        interval: Take the mask of a sparsity anew only at each interval-th step that draws it.
        skip: Layers to leave dense: patterns of parameter or module names such as "head" or "*.downsample.*", or a
            predicate of name and tensor.
        grad_norm: Divide the move by the norm of the whole gradient, as SAM does.
        compress: One or several compression operators (:class:`~groundwire_cram.Operator`) to draw from, in place of
            ``sparsities`` and ``pattern``, such as ``Quantize(8)`` or ``Chain([Magnitude(0.9), Quantize(8)])``.
        compat: "reference" prunes all parameters with more than one dimension, and takes the threshold of each of the
            optimizer's parameter groups by itself, as the published code does; otherwise the weights of all layers are
            pruned together (:meth:`~groundwire_cram.CrAM.describe`).
        strict: Refuse an N:M pattern that does not divide a layer, instead of leaving that layer dense with a warning.
        seed: Seed of the draws, which are a function of it, the global seed and the global step.
    """

    sparsities: float | Sequence[float] | None = None
    rho: float = 0.05
    _: KW_ONLY
    pattern: str = "global"
    plus: bool = True
    sparse_grad: bool = True
    interval: int = 1
    skip: Skip = ()
    grad_norm: bool = False
    compress: Operator | Sequence[Operator] | None = None
    compat: Literal["reference"] | None = None
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.sparsities, self.operators = _drawn_from(self.sparsities, self.pattern, self.compress)
        self.rho = at_least_zero("rho", self.rho)
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"interval must be a whole number of uses, at least 1, got {self.interval!r}")
        if self.compat not in (None, "reference"):
            raise ValueError(f'compat must be None or "reference", got {self.compat!r}')
        self._backend = getattr(self, "_backend", "auto")
        check_name(self._backend)


def with_settings(cls: _Class) -> _Class:
    """Finish a dataclass that inherits :class:`Settings`: documentation and types of all its arguments.

    It still accepts ``backend``, which was an argument once.
    """
    inherited = inspect.getdoc(Settings).partition("Args:\n")[2]  # type: ignore[union-attr]
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "").replace("Args:\n", f"Args:\n{inherited}\n", 1)
    init: Any = cls.__init__  # type: ignore[misc]
    # As types and not as strings, which would be looked up in the module of the subclass.
    hints = get_type_hints(cls)
    init.__annotations__ = {name: hints.get(name, None) for name in init.__annotations__}

    @functools.wraps(init)
    def accept_backend(self: Any, *args: Any, **kwargs: Any) -> None:
        if "backend" in kwargs:
            text = "backend= is deprecated and will go: kernels are chosen by device and dtype -> leave it out"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            self._backend = kwargs.pop("backend")
        init(self, *args, **kwargs)

    cls.__init__ = accept_backend  # type: ignore[misc]
    return cls


def _drawn_from(
    sparsities: float | Sequence[float] | None, pattern: str, compress: Operator | Sequence[Operator] | None
) -> tuple[tuple[float, ...] | None, tuple[Operator, ...]]:
    """Return the sparsities, if any, and the operators that steps draw from."""
    if compress is not None:
        if sparsities is not None or pattern != "global":
            raise ValueError("compress replaces sparsities and pattern -> give one or the other")
        found = tuple(compress) if isinstance(compress, Sequence) else (compress,)
        for operator in found:
            if not isinstance(operator, Operator):
                raise ValueError(f"an operator has a method apply(params), which {operator!r} lacks")
        if not found:
            raise ValueError("compress is empty -> give at least one operator, such as Quantize(8)")
        return None, found
    if pattern not in ("global", "layerwise"):
        if sparsities is not None:
            raise ValueError(f"pattern={pattern!r} fixes the sparsity -> leave sparsities out")
        return None, operators_of((), pattern)
    levels = DEFAULT_SPARSITIES if sparsities is None else sparsities
    checked = tuple(check_sparsity(s) for s in ([levels] if isinstance(levels, Real) else levels))  # type: ignore[union-attr]
    if not checked:
        raise ValueError("sparsities is empty -> give at least one fraction, such as 0.9")
    return checked, operators_of(checked, pattern)


def at_least_zero(name: str, value: Any) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: It is no number, or below zero.

    Example:
        >>> at_least_zero("rho", 1)
        1.0
    """
    number = -1.0 if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return number
