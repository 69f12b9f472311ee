"""The rescale rule as a ``torch.nn.utils.parametrize`` parametrization, and layers that are given it or baked.

There are two places where the rule is not recomputed. In evaluation without gradients the rescaled weight is kept as
long as the raw one has the same values. Under gradient accumulation it is computed once for the window: the
micro-batches meet a leaf, and :meth:`AOLParametrization.flush` sends the leaf's gradient through the rule once. Nothing
else is ever kept, so training cannot meet a stale weight or one that gives no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundwire_aol.errors import UnsoundError
from groundwire_aol.layers.autocorrelation import is_transformed
from groundwire_aol.layers.rescale import Geometry, Side, published, rescale

_Layer = TypeVar("_Layer", bound=nn.Module)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
#: What may carry the parametrization; subclasses may compute something else.
LAYERS = (nn.Linear, *CONVOLUTIONS)


class _Memory:
    """Cache of one layer. A copy of it remembers nothing: the graphs are the original's."""

    def __init__(self) -> None:
        self.accumulating = False
        self.evaluated: tuple[Tensor, Tensor] | None = None
        self.window: list[tuple[Tensor, Tensor, Tensor]] = []

    def __deepcopy__(self, _: dict[int, Any]) -> _Memory:
        return _Memory()

    def __reduce__(self) -> Any:
        return _Memory, ()


class AOLParametrization(nn.Module):
    """A raw weight P of any size as one with spectral norm at most 1.

    The rule is :func:`groundwire_aol.layers.rescale.rescale`. Float16 and bfloat16 weights are rescaled in float32 and
    rounded; also under autocast the rule runs in float32. The
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
        """Geometry that the rule uses: the published one knows no phases."""
        return published(self.geometry) if self.compat else self.geometry

    def extra_repr(self) -> str:
        """The settings."""
        return f"steps={self.steps}, side={self.side!r}" + (f", compat={self.compat!r}" if self.compat else "")

    def forward(self, original: Tensor) -> Tensor:
        """Return the rescaled weight, in the dtype of ``original``."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(original):  # type: ignore[attr-defined,no-untyped-call]
            return self._rescaled(original)
        learns = torch.is_grad_enabled() and original.requires_grad
        if not learns and not self.training:
            return self._evaluated(original)
        self._memory.evaluated = None
        if learns and self.training and self._memory.accumulating:
            return self._accumulated(original)
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

    def _accumulated(self, original: Tensor) -> Tensor:
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

    def zero_accumulated(self) -> None:
        """Give up the gradient of the window so far, as ``zero_grad`` does for raw weights."""
        for _, _, leaf in self._memory.window:
            leaf.grad = None

    def reset(self) -> None:
        """Drop everything that is kept, also a window's gradient."""
        self._memory = _Memory()


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    )


def parametrizations(module: nn.Module) -> Iterator[AOLParametrization]:
    """Return all AOL parametrizations in ``module``."""
    return (child for child in module.modules() if isinstance(child, AOLParametrization))


def aol_of(layer: nn.Module) -> AOLParametrization | None:
    """Return the AOL parametrization of ``layer.weight``, or None."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain = layer.parametrizations["weight"]  # type: ignore[index]
    return next((p for p in chain if isinstance(p, AOLParametrization)), None)


def geometry_of(layer: nn.Module) -> Geometry:
    """Return the geometry of a Linear or (transposed) convolution layer.

    Raises:
        UnsoundError: The padding can repeat input pixels, so that no bound on the kernel bounds the layer.

    Example:
        >>> geometry_of(nn.Conv1d(2, 2, 3, stride=2)).phases
        (2,)
    """
    if isinstance(layer, nn.Linear):
        return Geometry()
    assert isinstance(layer, CONVOLUTIONS)
    mode = layer.padding_mode
    if mode not in ("zeros", "circular"):
        raise UnsoundError(
            f"padding_mode {mode!r} repeats border pixels: {_REPEATS[mode]} -> use 'zeros' or 'circular'"
        )
    if mode == "circular":
        _refuse_wrapping_twice(layer)
    transposed = isinstance(layer, TRANSPOSED)
    return Geometry(tuple(layer.stride), tuple(layer.dilation), layer.groups, transposed, mode == "circular")


_REPEATS = {
    "reflect": "a 3 x 3 kernel with padding 1 reached norm 1.068, and up to 2 is possible",
    "replicate": "a 3 x 3 kernel with padding 1 reached norm 1.006, a 1 x 1 kernel 2.0",
}


def _refuse_wrapping_twice(layer: Any) -> None:
    if isinstance(layer.padding, str):
        return
    for size, dilation, padding in zip(layer.kernel_size, layer.dilation, layer.padding, strict=True):
        if 2 * padding > dilation * (size - 1):
            raise UnsoundError(
                f"circular padding {padding} on both sides of a kernel of size {size}, dilation {dilation}, computes "
                "outputs twice: norm 1.43 was measured for size 3 with padding 2, and 2.0 for size 1 with padding 1 -> "
                f"at most dilation * (size - 1) in all, such as {dilation * (size - 1) // 2}"
            )


def constrain(
    layer: _Layer, steps: int = 1, *, side: Side = "auto", compat: Literal["reference"] | None = None
) -> _Layer:
    """Give a Linear or convolution layer a weight of spectral norm at most 1, in place; its weight becomes the raw one.

    Plain checkpoints still load. ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")`` bakes it.

    Args:
        layer: A torch.nn Linear, Conv or ConvTranspose layer, or a subclass that computes the same.
        steps: 1, or 2 for the tighter rule.
        side: Channels to scale; "auto" for the fewer.
        compat: "reference" for the published rule.

    Raises:
        UnsoundError: The padding allows no bound.
        TypeError: ``layer`` is of another kind.

    Example:
        >>> layer = constrain(nn.Linear(3, 3))
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1)
        True
    """
    if not computes_linear(layer):
        raise TypeError(f"{type(layer).__name__} is not a Linear or convolution layer of torch.nn")
    if aol_of(layer) is None:
        rule = AOLParametrization(geometry_of(layer), steps, side, compat)
        rule.to(device=layer.weight.device)  # type: ignore[arg-type]
        rule.train(layer.training)
        # "unsafe" only skips torch's trial runs of the rule, which keeps shape and dtype.
        parametrize.register_parametrization(layer, "weight", rule, unsafe=True)
        layer.register_load_state_dict_pre_hook(_take_plain_weight)  # type: ignore[no-untyped-call]
    return layer


class UnitRows(nn.Module):
    """A raw weight as one whose rows have length 1."""

    groundwire_aol_unit_rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        # As for AOL: torch's own error for another model then names what the weights need.
        self.register_buffer("groundwire_aol_unit_rows", torch.empty(0))

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight with each row divided by its length, in float32 at least, in the dtype of ``original``."""
        exact = original if original.dtype in (torch.float32, torch.float64) else original.float()
        with torch.autocast(original.device.type, enabled=False):
            return nn.functional.normalize(exact, dim=1).to(original.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``layer.weight = w`` sets the raw weight."""
        return weight


def normalize_rows(layer: _Layer) -> _Layer:
    """Give a Linear layer a weight whose rows have length 1, in place; its weight becomes the raw one.

    Its norm may be up to the root of the number of rows, and two rows may differ by 2: as a last layer it is certified
    per pair of classes.

    Raises:
        TypeError: ``layer`` is of another kind.

    Example:
        >>> bool(torch.allclose(normalize_rows(nn.Linear(5, 2)).weight.norm(dim=1), torch.ones(2)))
        True
    """
    if not (isinstance(layer, nn.Linear) and computes_linear(layer)):
        raise TypeError(f"{type(layer).__name__} is no Linear layer")
    if not has_unit_rows(layer):
        rule = UnitRows().to(device=layer.weight.device)
        rule.train(layer.training)
        parametrize.register_parametrization(layer, "weight", rule, unsafe=True)
        layer.register_load_state_dict_pre_hook(_take_plain_weight)  # type: ignore[no-untyped-call]
    return layer


def has_unit_rows(layer: nn.Module) -> bool:
    """Tell whether :func:`normalize_rows` gave ``layer`` its weight."""
    return parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations["weight"][-1], UnitRows)  # type: ignore[index]


def computes_linear(layer: nn.Module) -> bool:
    """Tell whether ``layer`` is one of torch's Linear and convolution layers and computes what they do."""
    for cls in LAYERS:
        if isinstance(layer, cls):
            same = all(getattr(type(layer), name, None) is getattr(cls, name, None) for name in _COMPUTING)
            return same and not any(name in vars(layer) for name in _COMPUTING)
    return False


_COMPUTING = ("forward", "_conv_forward", "__call__")


def _take_plain_weight(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint of the plain layer load: its weight is the raw weight."""
    plain = f"{prefix}weight"
    if plain in state and (aol_of(layer) is not None or has_unit_rows(layer)):
        mark = "groundwire_aol_unit_rows" if has_unit_rows(layer) else "groundwire_aol"
        state[f"{prefix}parametrizations.weight.original"] = state.pop(plain)
        state[f"{prefix}parametrizations.weight.0.{mark}"] = torch.empty(0)


def bake(module: _Layer) -> _Layer:
    """Replace each parametrization of this package by the weight it gives, in place; outputs stay bit-equal.

    Example:
        >>> list(bake(constrain(nn.Linear(4, 4))).state_dict())
        ['weight', 'bias']
    """
    for layer in list(module.modules()):
        if aol_of(layer) is not None or has_unit_rows(layer):
            _own_class(layer)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            _drop_hook(layer)
            for name in [name for name in layer._parameters if name != "weight"]:
                layer._parameters[name] = layer._parameters.pop(name)  # the order of a plain layer
    return module


def _own_class(layer: nn.Module) -> None:
    """A class that no copy shares: torch deletes the weight's property from the class of a layer that it bakes."""
    cls = type(layer)
    layer.__class__ = type(cls.__name__, cls.__bases__, {k: v for k, v in vars(cls).items() if k not in _OF_CLASSES})


_OF_CLASSES = ("__dict__", "__weakref__")


def _drop_hook(layer: nn.Module) -> None:
    hooks = layer._load_state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "hook", None) is _take_plain_weight]:
        del hooks[key]
