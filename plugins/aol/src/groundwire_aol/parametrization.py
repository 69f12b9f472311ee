"""The rescale rule as a ``torch.nn.utils.parametrize`` parametrization, with the two places where it is not recomputed.

In evaluation without gradients the rescaled weight is kept as long as the raw one has the same values. Under gradient
accumulation it is computed once for the window: the micro-batches meet a leaf, and :meth:`AOLParametrization.flush`
sends
the leaf's gradient through the rule once. Nothing else is ever kept, so training cannot meet a stale weight or one that
gives no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundwire_aol.autocorrelation import is_transformed
from groundwire_aol.functional import Geometry, Side, published, rescale


class _Memory:
    """What one layer remembers. A copy of it remembers nothing: the graphs are the original's."""

    def __init__(self) -> None:
        self.accumulating = False
        self.evaluated: tuple[Tensor, Tensor] | None = None
        self.window: list[tuple[Tensor, Tensor, Tensor]] = []

    def __deepcopy__(self, _: dict[int, Any]) -> _Memory:
        return _Memory()

    def __reduce__(self) -> Any:
        return _Memory, ()


class AOLParametrization(nn.Module):
    """A raw weight P of any size as one with spectral norm at most 1; see :func:`groundwire_aol.functional.rescale`.

    Float16 and bfloat16 weights are rescaled in float32 and rounded; also under autocast the rule runs in float32. The
    bound holds for the float32 weight, not for a rounded one.

    Args:
        geometry: Of the layer.
        steps: 1, or 2 for the tighter rule.
        side: Channels to scale.
        compat: "reference" for the published rule.
    """

    groundwire_aol: Tensor

    def __init__(
        self,
        geometry: Geometry,
        steps: int = 1,
        side: Side = "auto",
        compat: Literal["reference"] | None = None,
    ) -> None:
        super().__init__()
        if steps not in (1, 2):
            raise ValueError(f"steps must be 1 or 2, got {steps!r}")
        self.geometry, self.steps, self.side, self.compat = geometry, steps, side, compat
        # Empty, and in every state_dict: torch's own error for a plain model then names what the weights need.
        self.register_buffer("groundwire_aol", torch.empty(0))
        self._memory = _Memory()

    @property
    def rescaled_geometry(self) -> Geometry:
        """The geometry that the rule uses: the published one knows no phases."""
        return published(self.geometry) if self.compat else self.geometry

    def extra_repr(self) -> str:
        """The settings."""
        return f"steps={self.steps}, side={self.side!r}" + (f", compat={self.compat!r}" if self.compat else "")

    def forward(self, original: Tensor) -> Tensor:
        """The rescaled weight, in the dtype of ``original``."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(original):  # type: ignore[attr-defined,no-untyped-call]
            return self._rescaled(original)
        learns = torch.is_grad_enabled() and original.requires_grad
        if not learns and not self.training:
            return self._evaluated(original)
        self._memory.evaluated = None
        if learns and self.training and self._memory.accumulating:
            return self._of_the_window(original)
        return self._rescaled(original)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``layer.weight = w`` sets the raw weight; the layer then has ``rescale(w)``, which is w if orthogonal."""
        return weight

    def _rescaled(self, original: Tensor) -> Tensor:
        exact = original if original.dtype in (torch.float32, torch.float64) else original.float()
        with torch.autocast(original.device.type, enabled=False):
            found = rescale(exact, self.geometry, steps=self.steps, side=self.side, compat=self.compat)
        return found.to(original.dtype)

    def _evaluated(self, original: Tensor) -> Tensor:
        kept = self._memory.evaluated
        # By value: `.data` edits do not move `_version`.
        if kept is None or not _same(kept[0], original):
            with torch.inference_mode(False), torch.no_grad():
                copy = original.detach().clone()
                kept = self._memory.evaluated = copy, self._rescaled(copy)
        return kept[1]

    def _of_the_window(self, original: Tensor) -> Tensor:
        window = self._memory.window
        if not window or not _same(window[-1][0], original):
            # The graph holds a copy, so that an edit of the weight in mid-window does not break it.
            copy = original.clone()
            weight = self._rescaled(copy)
            window.append((copy.detach(), weight, weight.detach().requires_grad_()))
        return window[-1][2]

    def accumulate(self, on: bool) -> None:
        """Compute the weight once per window from now on; :meth:`flush` must then come before gradients are read."""
        self._memory.accumulating = on

    def flush(self) -> None:
        """Add the window's gradient to that of the raw weight, and begin a new window."""
        window, self._memory.window = self._memory.window, []
        pairs = [(weight, leaf.grad) for _, weight, leaf in window if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([w for w, _ in pairs], [g for _, g in pairs])

    def zero_grad_of_window(self) -> None:
        """What ``zero_grad`` is for raw weights."""
        for _, _, leaf in self._memory.window:
            leaf.grad = None

    def forget(self) -> None:
        """Drop everything that is kept, also a window's gradient."""
        self._memory = _Memory()


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    )


def parametrizations(module: nn.Module) -> Iterator[AOLParametrization]:
    """All AOL parametrizations in ``module``."""
    return (child for child in module.modules() if isinstance(child, AOLParametrization))


def aol_of(layer: nn.Module) -> AOLParametrization | None:
    """The AOL parametrization of ``layer.weight``, or None."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain = layer.parametrizations["weight"]  # type: ignore[index]
    return next((p for p in chain if isinstance(p, AOLParametrization)), None)
