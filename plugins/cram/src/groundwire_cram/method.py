"""CrAM's settings: what is drawn for a step, from which parameters, and by which kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from groundwire import Finding
from groundwire.undo.random_states import derive_seed
from groundwire_cram.functional import check_sparsity
from groundwire_cram.gradient import Gradients, Move, compression_aware_gradient
from groundwire_cram.kernels import Kernels, select
from groundwire_cram.masks import Periodic
from groundwire_cram.memory import Copies
from groundwire_cram.operators import NM, Magnitude, Operator, operators_of
from groundwire_cram.selection import Skip, check_selection, selected

#: What ``sparsities`` is for a pattern that needs some.
DEFAULT_SPARSITIES = (0.5, 0.7, 0.9)


class Method:
    """The arguments that :class:`~groundwire_cram.CrAM` and :class:`~groundwire_cram.CrAMOptimizer` share.

    Both document them. One object serves one training.
    """

    def __init__(
        self,
        sparsities: float | Sequence[float] | None = None,
        rho: float = 0.05,
        *,
        pattern: str = "global",
        plus: bool = True,
        sparse_grad: bool = True,
        interval: int = 1,
        skip: Skip = (),
        grad_norm: bool = False,
        compress: Operator | Sequence[Operator] | None = None,
        compat: str | None = None,
        strict: bool = False,
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        self.sparsities, self.operators = _operators(sparsities, pattern, compress)
        self.pattern, self.compress = pattern, compress
        self.rho = at_least_zero("rho", rho)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a whole number of uses, at least 1, got {interval!r}")
        if compat not in (None, "reference"):
            raise ValueError(f'compat must be None or "reference", got {compat!r}')
        self.plus, self.sparse_grad, self.grad_norm = plus, sparse_grad, grad_norm
        self.interval, self.skip, self.compat, self.strict, self.seed = interval, skip, compat, strict, seed
        self.backend = backend
        self.periodic = [Periodic(o, interval) for o in self.operators] if interval > 1 else []
        self.kernels: Kernels | None = None
        self.why = ""
        self.overflows = 0
        self._buffers = Copies()
        if backend != "auto":  # which looks at the tensors first
            select(backend)

    @property
    def neutral(self) -> bool:
        """Whether these settings ask for ordinary training."""
        dense = all(isinstance(o, Magnitude) and o.sparsity == 0 for o in self.operators)
        return not self.plus and self.rho == 0 and dense

    def draw(self, step_seed: int) -> Operator:
        """The operator of the step with this seed: equal on all ranks and after a resume."""
        index = derive_seed(self.seed, step_seed) % len(self.operators)
        return self.periodic[index] if self.periodic else self.operators[index]

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise if these parameters cannot be compressed as asked; warn of layers that stay dense.

        Raises:
            ValueError: Nothing is prunable, a layer is weight-normalised, ``skip`` names nothing, or with ``strict``
                an N:M pattern does not divide a layer.
        """
        names = check_selection(parameters, self.skip)
        for operator in self.operators:
            if isinstance(operator, NM):
                operator.check({name: parameters[name] for name in names}, self.strict, stacklevel=3)

    def groups(self, weights: Mapping[str, Tensor], optimizer: Optimizer) -> list[list[str]]:
        """What is compressed together: everything, or with ``compat="reference"`` each of the optimizer's groups."""
        known = set(selected(weights, self.skip))
        if self.compat is None:
            return [[name for name in weights if name in known]]
        owner = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        numbers = range(len(optimizer.param_groups))
        return [[n for n, p in weights.items() if n in known and owner[id(p)] == number] for number in numbers]

    def gradient(
        self,
        weights: Mapping[str, Tensor],
        first: Mapping[str, Tensor],
        second_pass: Callable[[], Mapping[str, Tensor]],
        optimizer: Optimizer,
        step_seed: int,
        saved: dict[str, Tensor],
    ) -> Gradients | None:
        """:func:`~groundwire_cram.gradient.compression_aware_gradient` with what is drawn for this step."""
        if self.kernels is None:
            self.kernels, self.why = select(self.backend, list(weights.values()))
        groups = self.groups({name: weights[name] for name in first}, optimizer)
        move = Move(self.draw(step_seed), groups, self.rho, self.plus, self.sparse_grad, self.grad_norm)
        found = compression_aware_gradient(weights, first, second_pass, move, self.kernels, saved, self._buffers)
        self.overflows += found is None
        return found

    def release(self) -> None:
        """Give the memory back, and choose the backend anew for the next training."""
        self._buffers.clear()
        self.kernels = None

    def state_dict(self) -> dict[str, Any]:
        """The masks of periodic pruning, as bytes; nothing otherwise."""
        return {"periodic": [p.state_dict() for p in self.periodic]} if self.periodic else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for periodic, saved in zip(self.periodic, state.get("periodic", []), strict=False):
            periodic.load_state_dict(saved)

    def findings(self, plugin: str = "cram") -> list[Finding]:
        """Which kernels were used and why, and steps in which a moved weight was not finite."""
        found = []
        if self.kernels is not None:
            message = f"Kernels: {self.kernels.name}, because {self.why}."
            found.append(Finding(plugin, "backend", "info", self.kernels.name, message, "train"))
        if self.overflows:
            message = f"In {self.overflows} steps the compressed model was not finite; the model's gradient was used."
            found.append(Finding(plugin, "overflows", "warn", self.overflows, message, "train"))
        return found

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint says of how it was trained."""
        names = [str(operator) for operator in self.operators]
        return {"compress": names, "rho": self.rho, "plus": self.plus}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles choose their own backend and memory."""
        return {**vars(self), "kernels": None, "_buffers": Copies()}


#: The names of these arguments.
SHARED = frozenset(inspect.signature(Method).parameters)


def _operators(
    sparsities: float | Sequence[float] | None, pattern: str, compress: Operator | Sequence[Operator] | None
) -> tuple[tuple[float, ...] | None, tuple[Operator, ...]]:
    """The sparsities, if any, and what is drawn from."""
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
    """``value`` as a float.

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
