"""Embedding of any inputs: features in a table of bounded width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from groundwire.modules import evaluating

#: Width to which embeddings, and inputs that are no tables, are reduced.
WIDTH = 30


def resolve_embed(embed: Any, module: Any) -> Callable[[Any], Any] | None:
    """``embed`` as a callable: itself, or the part of ``module`` that a dotted name means.

    Raises:
        ValueError: The name means nothing callable.
    """
    if embed is None or (callable(embed) and not isinstance(embed, str)):
        found: Callable[[Any], Any] | None = embed
        return found
    if not isinstance(embed, str):
        raise ValueError(f"embed={embed!r} -> give a module, a function, or the name of a part of the LightningModule")
    try:
        part = reduce(getattr, embed.split("."), module)
    except AttributeError:
        part = None
    if not callable(part):
        names = ", ".join(name for name, _ in module.named_children())
        raise ValueError(f"embed={embed!r} is no part of {type(module).__name__} -> its children are: {names}")
    named: Callable[[Any], Any] = part
    return named


@contextmanager
def without_training(embed: Any) -> Iterator[None]:
    """Context manager for evaluation mode of the module of ``embed``, if there is one, without gradients."""
    owner = embed if isinstance(embed, nn.Module) else getattr(embed, "__self__", None)
    with evaluating(owner) if isinstance(owner, nn.Module) else nullcontext(), torch.no_grad():
        yield


def features(inputs: Any, embed: Callable[[Any], Any] | None) -> NDArray[Any]:
    """Features (B, d) float64 of a batch's inputs: embedded, or flattened.

    Raises:
        ValueError: There is nothing with one row for each input.
    """
    if embed is not None:
        owner = embed if isinstance(embed, nn.Module) else getattr(embed, "__self__", None)
        parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
        if parameter is not None and isinstance(inputs, Tensor):
            inputs = inputs.to(parameter.device)
        inputs = embed(inputs)
    if isinstance(inputs, Tensor):
        inputs = inputs.detach().cpu().double().numpy()
    try:
        array = np.asarray(inputs, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"inputs of type {type(inputs).__name__} are no numbers -> give embed=, which turns a batch of them into "
            "an array"
        ) from error
    if not array.ndim:
        raise ValueError(f"a batch became one number ({array}) -> embed= must give one row for each input")
    return array.reshape(len(array), -1)


def principal_components(x: NDArray[Any], width: int = WIDTH) -> NDArray[Any]:
    """The first ``width`` principal components of x (R, d), in float64; x itself if it is not wider.

    Raises:
        ValueError: A number is missing or infinite.

    Example:
        >>> principal_components(np.random.default_rng(0).normal(size=(100, 50)), 30).shape
        (100, 30)
    """
    if x.shape[1] <= width:
        return x
    wrong = ~np.isfinite(x).all(axis=1)
    if wrong.any():
        raise ValueError(
            f"the features of {int(wrong.sum())} rows have missing or infinite numbers, the first in row "
            f"{int(wrong.argmax())} -> fill them in, or leave these rows out"
        )
    components: NDArray[Any] = PCA(
        min(width, *x.shape), svd_solver="full" if x.shape[1] <= 500 else "auto", random_state=0
    ).fit_transform(x)
    return components
