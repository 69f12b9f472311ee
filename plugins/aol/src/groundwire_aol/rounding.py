r"""How far the computed scores can be from those of exact arithmetic: the rounding of the forward pass, proved.

Along the graph, next to each Lipschitz bound L, go the size of the exact value, ``||v(x)|| <= ||v(0)|| + L ||x||``, and
the error of the computed one. A step multiplies the errors of its inputs by its own constant and adds its own error in
the standard model of floating-point arithmetic: ``|fl(a op b) - a op b| <= u |a op b|``, u = 2^-24 in float32. A sum of
n products then errs by at most ``gamma_n = n u / (1 - n u)`` times the sum of their absolute values, in whatever order
and with or without fused operations, so that a linear layer adds ``gamma_n (|| |W| || ||x|| + ||b||)``. Everything is
affine in ``||x||``.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from groundwire_aol.rounding_rules import local_error
from groundwire_aol.situation import UNITS, Affine, Situation, smallest_normal

if TYPE_CHECKING:
    from groundwire_aol.rules import Rules
    from groundwire_aol.step import Proof, Step

#: Covers the rounding of the float64 arithmetic here.
_UP = 1 + 1e-9


@dataclass(frozen=True)
class Rounding:
    """Bound of the L2 distance between the computed and the exact output of one sample x: ``offset + slope ||x||``.

    Attributes:
        offset: In units of the output.
        slope: Per unit of the input's L2 norm.
        peak: Bound of everything in between, as (offset, slope): where it leaves the range of the dtype, nothing holds.
        dtype: What the model computes in.
        unknown: Why there is no bound; empty if there is one.
    """

    offset: float
    slope: float
    peak: tuple[float, float]
    dtype: torch.dtype
    unknown: str = ""

    def error(self, norm: Any) -> Any:
        """The bound for inputs of L2 norm at most ``norm``, a number or a tensor; infinite where nothing is proved.

        Example:
            >>> Rounding(1e-6, 1e-7, (0.0, 1.0), torch.float32).error(10.0)
            2e-06
        """
        norms = torch.as_tensor(norm, dtype=torch.float64)
        inside = (self.peak[0] + self.peak[1] * norms) < torch.finfo(self.dtype).max / 1024
        if self.unknown:
            inside = torch.zeros_like(inside)
        found = torch.where(inside, self.offset + self.slope * norms, math.inf)
        return found if isinstance(norm, Tensor) else float(found)

    def __str__(self) -> str:
        if self.unknown:
            return f"rounding has no bound: {self.unknown}"
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} scores within {self.offset:.3g} + {self.slope:.3g} ||x|| of exact ones"


class RoundingWalk:
    """What is known of every step's size and error, from the first to the last."""

    def __init__(self, rules: Rules, dtype: torch.dtype) -> None:
        self.rules, self.dtype = rules, dtype
        self.sizes: dict[fx.Node, Affine] = {}
        self.errors: dict[fx.Node, Affine] = {}
        self.peak = Affine(0.0, 1.0)
        self.unknown = "" if dtype in UNITS else f"{dtype} is not float32 or float64"

    def start(self, node: fx.Node) -> None:
        """The model's input, which is exact."""
        self.sizes[node], self.errors[node] = Affine(0.0, 1.0), Affine()

    def follow(self, step: Step, proof: Proof, value: Any) -> None:
        """Add one step that depends on the input. The second row of ``value`` is of the input zero."""
        if self.unknown:
            return
        rows = _floats(value)
        unit = max([UNITS.get(t.dtype, math.inf) for t in rows] + [UNITS[self.dtype]])
        computed = {n: self.sizes[n] + self.errors[n] for n in step.bounds}
        carried = self._through(step, proof, self.errors)
        zero = math.hypot(*(float(t[1].double().norm()) for t in rows))
        situation = Situation(
            step,
            self.rules.layer(step),
            value,
            unit,
            inputs=sum(computed.values(), Affine()),
            reached=self._through(step, proof, computed),
            size=Affine(zero, proof.lipschitz) + carried,
        )
        local = local_error(situation) if math.isfinite(unit) else None
        if local is None:
            self.unknown = f"{step.path} ({step.operation}) has no rule for its rounding"
            return
        entries = sum(t[0].numel() for t in rows)
        floor = 16 * smallest_normal(self.dtype) * math.sqrt(max(entries, 1)) * (1 + _constant(step, proof))
        # ``size`` counts the zero row as computed, not as it is: the factor makes up for that.
        error = (carried + local + Affine(floor)) * ((1 + 8 * unit) * _UP)
        self.errors[step.node] = error
        self.sizes[step.node] = Affine(zero + error.offset, proof.lipschitz)
        self.peak = self.peak.largest(self.sizes[step.node] + error * (1 / unit))

    def _through(self, step: Step, proof: Proof, table: Mapping[fx.Node, Affine]) -> Affine:
        """The step's own bound for inputs of these norms: rules are norms of what they are given."""
        nodes = list(step.bounds)
        if len(nodes) == 1 and step.bounds[nodes[0]] > 0:
            return table[nodes[0]] * (proof.lipschitz / step.bounds[nodes[0]])
        parts = []
        for part in ("offset", "slope"):
            again = self.rules.of(replace(step, bounds={n: getattr(table[n], part) for n in nodes}))
            parts.append(again.lipschitz if again is not None else math.inf)
        return Affine(*parts)

    def result(self, nodes: list[fx.Node]) -> Rounding:
        """Of the output, made of these steps."""
        found = [self.errors[n] for n in nodes if n in self.errors]
        total = Affine(math.hypot(*(e.offset for e in found)), math.hypot(*(e.slope for e in found)))
        finite = math.isfinite(total.offset) and math.isfinite(total.slope)
        unknown = self.unknown or ("" if finite else "a sum of products is too long for this dtype")
        return Rounding(total.offset, total.slope, (self.peak.offset, self.peak.slope), self.dtype, unknown)


def _constant(step: Step, proof: Proof) -> float:
    largest = max(step.bounds.values(), default=0.0)
    return proof.lipschitz / largest if largest else 0.0


def _floats(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for item in value for t in _floats(item)] if isinstance(value, list | tuple) else []


def not_standard(device: torch.device | str) -> str:
    """Why float32 on ``device`` is not known to follow the standard model; empty if it is.

    oneDNN and BLAS on x86 sum products as they are. Winograd convolutions, TF32 and bfloat16 matrix units do not.

    Example:
        >>> not_standard("meta")
        "on 'meta', convolutions by Winograd and products in TF32 cannot be excluded"
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return f"on {kind!r}, convolutions by Winograd and products in TF32 cannot be excluded"
    if platform.machine().lower() not in ("x86_64", "amd64", "x64"):
        return f"convolutions by Winograd cannot be excluded on {platform.machine()}"
    backends: Any = torch.backends
    if backends.nnpack.is_available() and not (backends.mkldnn.is_available() and backends.mkldnn.enabled):
        return "without oneDNN, NNPACK convolves by Winograd"
    onednn = backends.mkldnn
    settings = {onednn.fp32_precision, onednn.conv.fp32_precision, onednn.matmul.fp32_precision}
    reduced = not settings <= {"none", "ieee"} or torch.get_float32_matmul_precision() != "highest"
    if reduced or os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT").upper() != "STRICT":
        return "float32 products are allowed to be computed with fewer bits"
    return ""
