"""CrAM's part of one training: what a step draws, from which parameters, by which kernels; and what it remembers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire import Finding
from groundwire.undo.random_states import derive_seed
from groundwire_cram.gradient import Gradients, Move, compression_aware_gradient
from groundwire_cram.kernels.backends import select
from groundwire_cram.kernels.base import Kernels
from groundwire_cram.kernels.buffers import Buffers
from groundwire_cram.masks import Periodic
from groundwire_cram.operators import NM, Layout, Magnitude, Operator, Weights
from groundwire_cram.prunable import check_selection, layouts, selected, weights_of
from groundwire_cram.settings import Settings


class Minimizer:
    """The compression-aware minimizer with given settings; one object serves one training.

    Args:
        settings: Those of a :class:`~groundwire_cram.CrAM` or :class:`~groundwire_cram.CrAMOptimizer`, which may
            change between steps.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.operators = settings.operators
        self.periodic = [Periodic(o, settings.interval) for o in self.operators] if settings.interval > 1 else []
        self.kernels: Kernels | None = None
        self.why = ""
        self.overflows = 0
        self._buffers = Buffers()
        #: All parameters, those that are compressed, and their layouts.
        self._selected: tuple[frozenset[str], frozenset[str], Mapping[str, Layout]] | None = None

    @property
    def neutral(self) -> bool:
        """True if these settings ask for ordinary training."""
        dense = all(isinstance(o, Magnitude) and o.sparsity == 0 for o in self.operators)
        return not self.settings.plus and self.settings.rho == 0 and dense

    def draw(self, step_seed: int) -> Operator:
        """Return the operator of the step with this seed: equal on all ranks and after a resume."""
        index = derive_seed(self.settings.seed, step_seed) % len(self.operators)
        return self.periodic[index] if self.periodic else self.operators[index]

    def check(self, module: nn.Module | Mapping[str, Tensor]) -> None:
        """Raise if this module, or its parameters, cannot be compressed as asked; warn of layers that stay dense.

        Raises:
            ValueError: Nothing is prunable, a layer is weight-normalised, ``skip`` names nothing, or with ``strict``
                an N:M pattern does not divide a layer.
        """
        names = check_selection(module, self.settings.skip, self.settings.compat)
        for operator in self.operators:
            if isinstance(operator, NM):
                operator.check(self._weights(module, names), self.settings.strict, stacklevel=3)

    def _weights(self, module: nn.Module | Mapping[str, Tensor], names: Sequence[str]) -> Weights:
        if isinstance(module, nn.Module):
            return weights_of(module, names, self.settings.compat)
        return Weights({name: module[name] for name in names}, published=bool(self.settings.compat))

    def groups(self, weights: Mapping[str, Tensor], optimizer: Optimizer, module: nn.Module | None) -> list[list[str]]:
        """Return what is compressed together: all, or with ``compat="reference"`` each of the optimizer's groups."""
        if self._selected is None or not self._selected[0] >= weights.keys():
            inside = {} if module is None else dict(module.named_parameters())
            outside = {name: weight for name, weight in weights.items() if name not in inside}
            names = selected(outside, self.settings.skip, self.settings.compat)
            names += selected(module, self.settings.skip, self.settings.compat) if module is not None else []
            known = {} if module is None or self.settings.compat else layouts(module)
            self._selected = frozenset(inside | outside), frozenset(names), known
        chosen = self._selected[1]
        if self.settings.compat is None:
            return [[name for name in weights if name in chosen]]
        owner = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        numbers = range(len(optimizer.param_groups))
        return [[n for n, p in weights.items() if n in chosen and owner[id(p)] == number] for number in numbers]

    def gradient(
        self,
        weights: Mapping[str, Tensor],
        first: Mapping[str, Tensor],
        second_pass: Callable[[], Mapping[str, Tensor]],
        optimizer: Optimizer,
        step_seed: int,
        saved: dict[str, Tensor],
        module: nn.Module | None,
    ) -> Gradients | None:
        """Return :func:`~groundwire_cram.gradient.compression_aware_gradient` with what is drawn for this step.

        ``module`` has the parameters under the names in ``weights``; None if it is not known.
        """
        if self.kernels is None:
            self.kernels, self.why = select(self.settings._backend, list(weights.values()))
        groups, s = self.groups({name: weights[name] for name in first}, optimizer, module), self.settings
        operator = self.draw(step_seed)
        if isinstance(operator, Periodic):
            operator.next_use()
        known = self._selected[2] if self._selected else {}
        move = Move(operator, groups, s.rho, s.plus, s.sparse_grad, s.grad_norm, known, bool(s.compat))
        found = compression_aware_gradient(weights, first, second_pass, move, self.kernels, saved, self._buffers)
        self.overflows += found is None
        return found

    def release(self) -> None:
        """Give the memory back, and choose the backend anew for the next training."""
        self._buffers.clear()
        self.kernels = self._selected = None

    def state_dict(self) -> dict[str, Any]:
        """Return the masks of periodic pruning, as bytes; nothing otherwise."""
        return {"periodic": [p.state_dict() for p in self.periodic]} if self.periodic else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for periodic, saved in zip(self.periodic, state.get("periodic", []), strict=False):
            periodic.load_state_dict(saved)

    def findings(self, plugin: str = "cram") -> list[Finding]:
        """Return which kernels were used and why, and steps in which a moved weight was not finite."""
        found = []
        if self.kernels is not None:
            message = f"Kernels: {self.kernels.name}, because {self.why}."
            found.append(Finding(plugin, "backend", "info", self.kernels.name, message, "train"))
        if self.overflows:
            message = f"In {self.overflows} steps the compressed model was not finite; the model's gradient was used."
            found.append(Finding(plugin, "overflows", "warn", self.overflows, message, "train"))
        return found

    def provenance(self) -> dict[str, Any]:
        """Return what a checkpoint says of how it was trained."""
        names = [str(operator) for operator in self.operators]
        return {"compress": names, "rho": self.settings.rho, "plus": self.settings.plus}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles choose their own backend and memory."""
        return {**vars(self), "kernels": None, "_buffers": Buffers(), "_selected": None}
