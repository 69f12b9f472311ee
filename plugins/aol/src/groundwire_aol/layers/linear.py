"""Layers with the signatures of torch.nn whose weight has spectral norm at most 1 (Prach and Lampert, 2022)."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundwire_aol.layers.initialisers import nearest_orthogonal_
from groundwire_aol.layers.parametrization import aol_of, constrain, geometry_of, normalize_rows
from groundwire_aol.layers.rescale import Side

Size: TypeAlias = int | tuple[int, ...]


class _Orthogonal:
    """Begins with a random orthogonal matrix and no bias: the rescale then changes nothing."""

    bias: Tensor | None
    weight: Tensor

    def reset_parameters(self) -> None:
        """Draw the raw weight anew."""
        layer: Any = self
        raw = layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else layer.weight
        rule = aol_of(layer)
        nn.init.normal_(raw)
        nearest_orthogonal_(raw, geometry_of(layer), rule.side if rule is not None and not rule.compat else "auto")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class AOLLinear(_Orthogonal, nn.Linear):  # type: ignore[misc]
    """A dense layer whose weight has spectral norm at most 1, as :class:`torch.nn.Linear` otherwise.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a bias, which begins at 0.
        steps: 1, or 2 for the tighter rule.
        side: Features to scale: "in", "out", or "auto" for the fewer.
        compat: "reference" for the published rule to the letter.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (..., in_features) to (..., out_features).

    Example:
        >>> x = torch.randn(5, 8)
        >>> layer = AOLLinear(8, 8, bias=False)  # begins orthogonal, so lengths stay
        >>> bool(torch.allclose(layer(x).norm(dim=1), x.norm(dim=1)))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        steps: int = 1,
        *,
        side: Side = "auto",
        compat: Literal["reference"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        constrain(self, steps, side=side, compat=compat)


class NormalizedLinear(_Orthogonal, nn.Linear):  # type: ignore[misc]
    """A last layer whose rows have length 1, as :class:`torch.nn.Linear` otherwise; certified per pair of classes.

    Its norm may be up to the root of the number of classes, and two rows may differ by 2, so the rule with sqrt(2) does
    not hold with the bound of the layers before it: :func:`groundwire_aol.lipschitz_bound` keeps that and the rows, and
    :func:`groundwire_aol.certified_radius` divides each margin by ``L_body ||w_y - w_j||``.

    Args:
        in_features: Size of each input.
        out_features: Number of classes.
        bias: Whether to add a bias, which begins at 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (B, in_features) to (B, out_features).

    Example:
        >>> bool(torch.allclose(NormalizedLinear(8, 3).weight.norm(dim=1), torch.ones(3)))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        normalize_rows(self)


class _Convolution(_Orthogonal):
    """Arguments that the convolutions share with torch's, and the constraint."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "circular", "reflect", "replicate"] = "zeros",
        steps: int = 1,
        *,
        side: Side = "auto",
        compat: Literal["reference"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = stride, padding, dilation, groups, bias, padding_mode
        super().__init__(in_channels, out_channels, kernel_size, *geometry, device, dtype)  # type: ignore[call-arg]
        constrain(self, steps, side=side, compat=compat)  # type: ignore[type-var]


class AOLConv1d(_Convolution, nn.Conv1d):
    """A 1-D convolution with spectral norm at most 1 at every input size, as :class:`torch.nn.Conv1d` otherwise.

    Arguments and errors as for :class:`AOLConv2d`.

    Example:
        >>> AOLConv1d(4, 8, 3, stride=2, padding=1)(torch.zeros(1, 4, 8)).shape
        torch.Size([1, 8, 4])
    """


class AOLConv2d(_Convolution, nn.Conv2d):
    """A 2-D convolution with spectral norm at most 1 at every input size, as :class:`torch.nn.Conv2d` otherwise.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the kernel.
        stride: Stride; above 1 each phase of the input is scaled by itself (zero padding only).
        padding: Zeros on both sides, or "same" or "valid".
        dilation: Distance of the taps.
        groups: Blocks of channels.
        bias: Whether to add a bias, which begins at 0.
        padding_mode: "zeros", or "circular" with a total padding of at most dilation * (kernel_size - 1).
        steps: 1, or 2 for the tighter rule.
        side: Channels to scale: "in", "out", or "auto" for the fewer.
        compat: "reference" for the published rule to the letter.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UnsoundError: A padding that repeats pixels, for which the bound does not hold.

    Example:
        >>> AOLConv2d(4, 8, 3, stride=2, padding=1)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """


class AOLConv3d(_Convolution, nn.Conv3d):
    """A 3-D convolution with spectral norm at most 1 at every input size, as :class:`torch.nn.Conv3d` otherwise.

    Arguments and errors as for :class:`AOLConv2d`.

    Example:
        >>> AOLConv3d(4, 8, 3, stride=2, padding=1)(torch.zeros(1, 4, 8, 8, 8)).shape
        torch.Size([1, 8, 4, 4, 4])
    """


class AOLConvTranspose2d(_Orthogonal, nn.ConvTranspose2d):
    """A transposed convolution with spectral norm at most 1, as :class:`torch.nn.ConvTranspose2d` otherwise.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: int | tuple[int, int] of the kernel.
        stride: Stride.
        padding: What is cut from both sides of the output.
        output_padding: What is added to one side of the output.
        groups: Blocks of channels.
        bias: Whether to add a bias, which begins at 0.
        dilation: Distance of the taps.
        padding_mode: "zeros", as in torch.
        steps: 1, or 2 for the tighter rule.
        side: Channels to scale: "in", "out", or "auto" for the fewer.
        compat: "reference" for the published rule to the letter.
        device: Of the parameters.
        dtype: Of the parameters.

    Example:
        >>> AOLConvTranspose2d(8, 4, 2, stride=2)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        steps: int = 1,
        *,
        side: Side = "auto",
        compat: Literal["reference"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        constrain(self, steps, side=side, compat=compat)
