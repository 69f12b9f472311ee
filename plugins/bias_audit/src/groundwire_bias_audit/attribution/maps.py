"""Attributions of one model by captum: a map for each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundwire.modules import evaluating

Maps: TypeAlias = NDArray[np.float64]
METHODS = ("auto", "gradcam", "input_x_gradient", "integrated_gradients", "occlusion")


def attributions(
    module: nn.Module, inputs: Tensor, targets: Tensor, method: str, layer: nn.Module | None, batch: int
) -> Maps:
    """One map for each row: attributions summed over channels, shape (n, positions), by captum."""
    found = [
        _explained(module, inputs[i : i + batch], targets[i : i + batch], method, layer)
        for i in range(0, len(inputs), batch)
    ]
    return np.concatenate(found)


def _explained(module: nn.Module, x: Tensor, y: Tensor, method: str, layer: nn.Module | None) -> Maps:
    from captum import attr

    device = next((p.device for p in module.parameters()), x.device)
    target: Any = y.to(device)

    def scores(batch: Tensor) -> Tensor:
        out: Tensor = module(batch)
        return out[:, None] if out.ndim == 1 else out

    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().to(device).clone().requires_grad_()  # inside: a tensor of inference mode has no gradient
        with torch.no_grad():
            single = scores(x[:1]).shape[1] == 1
        sign = torch.where(target > 0, 1.0, -1.0) if single else torch.ones(len(x), device=device)
        target = torch.zeros_like(target) if single else target
        if method == "gradcam":
            raw = attr.LayerGradCam(scores, layer or last_convolution(module)).attribute(x, target)
            maps = attr.LayerAttribution.interpolate(raw, tuple(x.shape[2:]), "bilinear" if x.ndim == 4 else "nearest")
        elif method == "integrated_gradients":
            maps = attr.IntegratedGradients(scores).attribute(x, target=target, internal_batch_size=max(len(x), 1))
        elif method == "occlusion":
            window = (x.shape[1], *(max(1, s // 6) for s in x.shape[2:]))
            maps = attr.Occlusion(scores).attribute(x, window, strides=window, target=target)
        else:
            maps = attr.InputXGradient(scores).attribute(x, target=target)
    maps = maps.detach() * sign.view(-1, *[1] * (maps.ndim - 1))
    summed = maps.sum(dim=1) if maps.ndim > 2 else maps
    flat: Maps = summed.flatten(1).double().cpu().numpy()
    return flat


def last_convolution(module: nn.Module) -> nn.Module:
    """The last convolution in ``module.modules()``.

    Raises:
        ValueError: There is none.
    """
    found = [m for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not found:
        raise ValueError(f"{type(module).__name__} has no convolution -> use method='input_x_gradient'")
    return found[-1]


def resolved(method: str, dense: nn.Module, layer: nn.Module | None) -> str:
    """The method that "auto" stands for: Grad-CAM where there is a convolution, else input x gradient."""
    if method != "auto":
        return method
    convolutions = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in dense.modules())
    return "gradcam" if layer is not None or convolutions else "input_x_gradient"


@contextmanager
def without_gradients_kept(module: nn.Module) -> Iterator[None]:
    """Context manager for ``module`` in evaluation mode; its gradients are afterwards as they were."""
    grads = [(p, p.grad) for p in module.parameters()]
    try:
        with evaluating(module):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
