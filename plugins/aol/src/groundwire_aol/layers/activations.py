"""Activations with slope 1 or -1 everywhere: they bound the model by 1 without making its gradient vanish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Pairing: TypeAlias = Literal["adjacent", "halves"]


def _channels(x: Tensor, dim: int, group: int, who: str) -> int:
    channels = x.shape[dim]
    if channels % group:
        raise ValueError(
            f"{who} needs a multiple of {group} channels in dimension {dim}, got an input of shape {tuple(x.shape)} -> "
            "make the layer before it wider by one, or leave its activation out"
        )
    return channels


class MaxMin(nn.Module):
    """Each pair of channels becomes (larger, smaller): 1-Lipschitz, and isometric wherever it is differentiable.

    Args:
        pairing: "adjacent" pairs channels (2i, 2i + 1), "halves" pairs i with i + C / 2. They are permutations of each
            other, but checkpoints of one do not work with the other.
        dim: Dimension of the channels.

    Raises:
        ValueError: In ``forward``, for an odd number of channels.

    Example:
        >>> MaxMin()(torch.tensor([[1.0, 2.0, 4.0, 3.0]]))
        tensor([[2., 1., 4., 3.]])
    """

    def __init__(self, pairing: Pairing = "adjacent", dim: int = 1) -> None:
        super().__init__()
        if pairing not in ("adjacent", "halves"):
            raise ValueError(f"pairing must be 'adjacent' or 'halves', got {pairing!r}")
        self.pairing, self.dim = pairing, dim

    def extra_repr(self) -> str:
        """The settings."""
        return f"pairing={self.pairing!r}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        channels = _channels(x, self.dim, 2, "MaxMin")
        split = (channels // 2, 2) if self.pairing == "adjacent" else (2, channels // 2)
        along = self.dim % x.dim() + (self.pairing == "adjacent")
        one, other = x.unflatten(self.dim, split).unbind(along)  # type: ignore[no-untyped-call]
        return torch.stack((torch.maximum(one, other), torch.minimum(one, other)), along).flatten(
            along - (self.pairing == "adjacent"), along + (self.pairing == "halves")
        )


class GroupSort(nn.Module):
    """Each group of neighbouring channels sorted: 1-Lipschitz, and isometric wherever it is differentiable.

    Args:
        group_size: Channels in a group; None for all of them (full sort).
        descending: Whether the largest comes first; with ``group_size=2`` this is :class:`MaxMin`.
        dim: Dimension of the channels.

    Raises:
        ValueError: The channels are no multiple of ``group_size`` (in ``forward``), or it is below 1.

    Example:
        >>> GroupSort(4)(torch.tensor([[3.0, 1.0, 4.0, 2.0]]))
        tensor([[1., 2., 3., 4.]])
    """

    def __init__(self, group_size: int | None = 2, descending: bool = False, dim: int = 1) -> None:
        super().__init__()
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.group_size, self.descending, self.dim = group_size, descending, dim

    def extra_repr(self) -> str:
        """The settings."""
        return f"group_size={self.group_size}, descending={self.descending}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        size = self.group_size or x.shape[self.dim]
        channels = _channels(x, self.dim, size, "GroupSort")
        dim = self.dim % x.dim()
        groups = x.unflatten(dim, (channels // size, size))  # type: ignore[no-untyped-call]
        return groups.sort(dim=dim + 1, descending=self.descending).values.flatten(dim, dim + 1)  # type: ignore[no-any-return]


#: Knots (lower, upper), tiled over the channels. "abs_identity": |x| and x in turn, as in the main experiments.
KNOTS: dict[str, tuple[float, ...]] = {
    "abs_identity": (-100.0, 0.0, 0.0, 0.0),
    "default": (-1.0, 0.0, 0.0, 0.0),
    "abs": (-100.0, 0.0),
    "identity": (0.0, 0.0),
}


class NActivation(nn.Module):
    r"""The N-activation (Prach and Lampert, 2023): slope 1, -1, 1 with two learned knots per channel.

    With knots ``a <= b`` (sorted in every pass): ``x - 2a`` below a, ``-x`` between them, ``x - 2b`` above b. Any knots
    give a 1-Lipschitz function of slope 1 or -1, and networks of them can fit every such piecewise linear function of
    one variable, which MaxMin networks cannot.

    Args:
        num_features: Channels.
        init: "abs_identity" (|x| and x in turn), "default" (knots -1, 0 and 0, 0 in turn), "abs", "identity",
            "log_uniform" (-10^u and 10^u, u uniform in (-5, 0)), or knots to tile over the channels.
        lr_factor: The knots' learning rate relative to the optimizer's; they are stored divided by its root.
        dim: Dimension of the channels.

    Raises:
        ValueError: ``init`` is unknown or not an even number of knots, or ``lr_factor`` is not positive.

    Example:
        >>> NActivation(1, init="abs")(torch.tensor([[-2.0], [3.0]])).flatten().tolist()
        [2.0, 3.0]
    """

    groundwire_aol: Tensor

    def __init__(
        self,
        num_features: int,
        init: Literal["abs_identity", "default", "abs", "identity", "log_uniform"] | Sequence[float] = "abs_identity",
        lr_factor: float = 1e-2,
        dim: int = 1,
    ) -> None:
        super().__init__()
        if not lr_factor > 0:
            raise ValueError(f"lr_factor must be positive, got {lr_factor}")
        self.num_features, self.init, self.lr_factor, self.dim = num_features, init, lr_factor, dim
        self.theta = nn.Parameter(_knots(num_features, init) / math.sqrt(lr_factor))
        self.register_buffer("groundwire_aol", torch.empty(0))
        self.register_load_state_dict_pre_hook(_fill_in_theta)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_features}, init={self.init!r}, lr_factor={self.lr_factor}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        if x.shape[self.dim] != self.num_features:
            raise ValueError(f"NActivation({self.num_features}) got an input of shape {tuple(x.shape)}")
        shape = [1] * x.dim()
        shape[self.dim] = self.num_features
        knots = (self.theta * math.sqrt(self.lr_factor)).to(x.dtype)
        low, high = (k.view(shape) for k in (knots.amin(1), knots.amax(1)))
        return torch.where(x < low, x - 2 * low, torch.where(x < high, -x, x - 2 * high))


def _knots(features: int, init: Any) -> Tensor:
    if init == "log_uniform":
        return torch.pow(10.0, -5 * torch.rand(features, 2)) * torch.tensor([-1.0, 1.0])
    if isinstance(init, str) and init not in KNOTS:
        raise ValueError(f"init must be one of {', '.join([*KNOTS, 'log_uniform'])} or knots, got {init!r}")
    values = torch.tensor(KNOTS[init] if isinstance(init, str) else tuple(init), dtype=torch.get_default_dtype())
    if values.numel() % 2 or not values.numel():
        raise ValueError(f"init must hold pairs of knots, got {init!r}")
    pairs = values.view(-1, 2)
    return pairs.repeat(math.ceil(features / len(pairs)), 1)[:features]


def _fill_in_theta(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of the plain model, which has neither knots nor mark, keeps the knots as they are."""
    if f"{prefix}theta" not in state and f"{prefix}groundwire_aol" not in state:
        state.update({f"{prefix}{key}": value for key, value in module.state_dict().items()})
