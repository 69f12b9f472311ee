"""Layers for inference whose pruned weight is stored, and multiplied, sparse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from groundwire_cram.sparse import products
from groundwire_cram.sparse.csr import CSR, decode, encode, matrix, narrowed, problem, widened

#: A loaded weight with this many times the nonzero entries of the measured one gets a warning.
_DENSER = 1.5


def _recorded() -> bool:
    """Return whether this call is only taken down, to be run later."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


class SparseLayer(nn.Module):
    """Base of the sparse layers: a weight (out, in) in CSR, moves, state and refusals.

    The state dict has ``values``, ``columns`` (int32, or uint16 seen as int16 for the Numba kernels; either loads),
    ``row_starts`` (int32) and ``bias``; a state dict with a dense ``weight`` in their place loads too. There are no
    parameters, so an optimizer finds nothing to change by mistake.
    """

    values: Tensor
    columns: Tensor
    row_starts: Tensor
    bias: Tensor | None

    #: The class of the layer whose weight is stored as (in, out), such as the Conv1D of transformers; else None.
    transposed: type[nn.Module] | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None, tile: int | None = products.TILE) -> None:
        super().__init__()
        encoded = encode(weight.flatten(1))
        self.shape = tuple(weight.shape)
        self.register_buffer("values", encoded.values)
        self.register_buffer("columns", encoded.columns)
        self.register_buffer("row_starts", encoded.rows)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.tile = tile
        self._made: tuple[CSR, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """Weight as a dense copy: reading is right though slow, writing has no effect."""
        dense = decode(self._csr(), self.shape[1]).reshape(self.shape)
        return dense if self.transposed is None else dense.t().contiguous()

    @property
    def density(self) -> float:
        """Nonzero entries divided by all."""
        return len(self.values) / max(1, self.shape[0] * self.shape[1])

    @property
    def bytes(self) -> int:
        """Memory of the weight with its indices."""
        return sum(t.numel() * t.element_size() for t in self._csr())

    def extra_repr(self) -> str:
        """Shape and density."""
        return f"{self.shape[1]}, {self.shape[0]}, density={self.density:.3g}, bias={self.bias is not None}"

    def _csr(self) -> CSR:
        # Not as attributes: those of a module that are buffers take as long as a small product.
        buffers: Any = self._buffers
        return CSR(buffers["values"], buffers["columns"], buffers["row_starts"])

    def use_compiled(self) -> None:
        """Take the Numba kernels from now on, with the columns in the form that they need.

        Raises:
            RuntimeError: There are none, or cannot take this weight.
        """
        if not products.suits_numba(self.shape[1], self.values.dtype):
            raise RuntimeError(f"the kernels need float32 and at most {products.MOST_COLUMNS} inputs")
        kernels = products.load_numba()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        if not self.is_compiled:
            self.columns = narrowed(self.columns)

    @property
    def is_compiled(self) -> bool:
        """True if the layer takes the Numba kernels, wherever there are some, and not the product of MKL."""
        return self.columns.dtype == torch.int16

    def _matrix(self) -> Tensor:
        """Return the sparse matrix of the buffers that there are now; something may have exchanged them."""
        buffers = self._csr()
        if self._made is None or any(a is not b for a, b in zip(self._made[0], buffers, strict=True)):
            self._made = (buffers, matrix(buffers, self.shape[1]))
        return self._made[1]

    def _fused(self, csr: CSR, x: Tensor) -> bool:
        return csr.columns.dtype == torch.int16 and x.dtype == torch.float32 and products.has_numba()

    def _rows(self, x: Tensor) -> Tensor:
        """Multiply: x (B, in) to (B, out)."""
        csr, bias = self._csr(), self._buffers["bias"]
        if _recorded():
            found: Tensor = products.sparse_linear(x, *csr, bias, self.tile)
            return found
        if self._fused(csr, x):
            return products.numba_times_rows(csr, bias, x)
        return products.mkl_times_rows(self._matrix(), bias, x, self.tile)

    def _call(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``product(x)`` after the refusals, in the layer's dtype; under autocast the result has autocast's."""
        name = type(self).__name__
        if self.training:
            raise RuntimeError(f"{name} is for inference -> call .eval(), or densify(module) to train again")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no gradient -> use torch.no_grad(), or densify(module) to train again")
        if not _recorded():
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise RuntimeError(f"{name} has no rules for torch.func (vmap, jvp, grad) -> densify(module)")
            if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
                raise RuntimeError(f"{name} has no tangent in forward-mode AD -> densify(module)")
        values: Any = self._buffers["values"]
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return product(x.to(values.dtype)).to(torch.get_autocast_dtype(x.device.type))
        if x.dtype != values.dtype or x.device != values.device:
            raise RuntimeError(
                f"{name} holds {values.dtype} on {values.device}, got an input of {x.dtype} on {x.device} "
                "-> convert the input, or sparsify a module of the wanted dtype"
            )
        return product(x)

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise if ``fn`` takes tensors to where this layer was not measured."""
        after = fn(self.values[:0])
        if after.device.type != "cpu" or after.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"{type(self).__name__} cannot become {after.dtype} on {after.device}: sparse layers were measured "
                "where they are -> densify(module), move that, and sparsify it there"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.check_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *reports: list[str]
    ) -> None:
        """Take a dense ``weight`` or the sparse triple, whose length may differ from what is here."""
        names = [prefix + name for name in ("values", "columns", "row_starts")]
        if prefix + "weight" in state_dict:
            weight = state_dict.pop(prefix + "weight")
            weight = weight if self.transposed is None else weight.t()
            if tuple(weight.shape) != self.shape:
                reports[-1].append(f"{prefix}weight has shape {tuple(weight.shape)}, the layer {self.shape}")
                return
            state_dict.update(zip(names, encode(weight.flatten(1)), strict=True))
        if all(name in state_dict for name in names):
            loaded = CSR(*(state_dict[name] for name in names))
            found = problem(loaded, *self.shape[:2])
            if found is not None:
                reports[-1].append(f"{prefix}values, columns, row_starts: {found}")
                return
            columns = widened(loaded.columns)
            state_dict[names[1]] = narrowed(columns) if self.is_compiled else columns
            self._make_room(prefix, loaded)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *reports)

    def _make_room(self, prefix: str, loaded: CSR) -> None:
        if len(loaded.values) > _DENSER * len(self.values):
            warnings.warn(
                f"{prefix or type(self).__name__}: the loaded weight has {len(loaded.values)} nonzero entries, the one "
                f"measured {len(self.values)}; it may be slower than dense -> sparsify again",
                stacklevel=2,
            )
        self.values = self.values.new_empty(loaded.values.shape)
        self.columns = self.columns.new_empty(loaded.columns.shape)
        self.row_starts = self.row_starts.new_empty(loaded.rows.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made on demand."""
        return {**self.__dict__, "_made": None}


def move_together(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Move a module with sparse layers, or none of it: its ``_apply``."""
    for layer in module.modules():
        if isinstance(layer, SparseLayer):
            layer.check_move(fn)
    return type(module)._apply(module, fn, recurse)  # type: ignore[no-untyped-call]


class SparseLinear(SparseLayer):
    """``y = x W^T + b`` for a pruned W, on the CPU, without gradients.

    The product is MKL's, or after :meth:`use_compiled` that of a Numba kernel. Differs from ``F.linear`` by the
    order of summation; where x is infinite or NaN, a weight of zero gives 0 instead of NaN.

    Args:
        weight: (out, in), float32 or float64.
        bias: (out,) or None.
        tile: Rows of x per product, None for all at once.

    Example:
        >>> layer = SparseLinear(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 3.0])).eval()
        >>> layer(torch.tensor([[5.0, 1.0], [0.0, 0.0]]))
        tensor([[3., 3.],
                [1., 3.]])
    """

    @property
    def in_features(self) -> int:
        """Length of an input row."""
        return int(self.shape[1])

    @property
    def out_features(self) -> int:
        """Length of an output row."""
        return int(self.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Rows x (..., in) to rows (..., out)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(f"SparseLinear needs inputs (..., {self.in_features}), got {tuple(x.shape)}")
        return self._call(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        return self._rows(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


class SparseConv(SparseLayer):
    """A pruned convolution in 1 to 3 dimensions whose kernel has one position (1x1), without padding or groups.

    Args:
        weight: (out, in, 1, ...), float32 or float64.
        bias: (out,) or None.
        stride: One number a dimension.
        tile: Positions per product, None for all at once.

    Example:
        >>> layer = SparseConv(torch.tensor([[[0.0], [2.0]]]), None, stride=(2,)).eval()
        >>> layer(torch.arange(6.0).view(1, 2, 3))
        tensor([[[ 6., 10.]]])
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], tile: int | None = products.TILE
    ) -> None:
        super().__init__(weight, bias, tile)
        self.stride = stride

    @property
    def in_channels(self) -> int:
        """Channels of an input."""
        return int(self.shape[1])

    @property
    def out_channels(self) -> int:
        """Channels of an output."""
        return int(self.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Images x (N, in, ...) or (in, ...) to (N, out, ...) or (out, ...)."""
        dims = len(self.stride)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            sizes = ", ".join(["..."] * dims)
            raise RuntimeError(f"SparseConv needs inputs (N, {self.in_channels}, {sizes}), got {tuple(x.shape)}")
        return self._call(self._forward if x.dim() == dims + 2 else self._single, x)

    def _single(self, x: Tensor) -> Tensor:
        return self._forward(x[None])[0]

    def _forward(self, x: Tensor) -> Tensor:
        if max(self.stride) > 1:
            steps: list[Any] = [slice(None, None, step) for step in self.stride]
            x = x[(..., *steps)]
        if _recorded():
            return self._by_position(x)
        positions, csr = math.prod(x.shape[2:]), self._csr()
        if self._fused(csr, x):
            if positions < products.LANES:
                return self._by_position(x)
            y = products.numba_times_columns(csr, self.bias, x.reshape(*x.shape[:2], positions))
            return y.view(len(x), self.out_channels, *x.shape[2:])
        flat = x.transpose(0, 1).reshape(self.in_channels, len(x) * positions)
        y = products.mkl_times_columns(self._matrix(), self.bias, flat, self.tile)
        return y.view(self.out_channels, len(x), *x.shape[2:]).transpose(0, 1).contiguous()

    def _by_position(self, x: Tensor) -> Tensor:
        y = self._rows(x.movedim(1, -1).reshape(-1, self.in_channels))
        return y.view(len(x), *x.shape[2:], self.out_channels).movedim(-1, 1).contiguous()
