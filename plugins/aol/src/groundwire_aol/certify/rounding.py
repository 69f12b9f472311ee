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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        """Return the bound for inputs of L2 norm at most ``norm``, a number or a tensor.

        It is infinite where nothing is proved.

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


def not_standard(device: torch.device | str) -> str:
    """Return why float32 on ``device`` is not known to follow the standard model; empty if it is.

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
