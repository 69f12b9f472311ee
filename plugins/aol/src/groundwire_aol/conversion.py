"""A stock network as a 1-Lipschitz one, with a list of what was changed; what has no rule is refused, never guessed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from groundwire_aol.bound import lipschitz_bound
from groundwire_aol.certificates import smallest_std
from groundwire_aol.parametrization import aol_of
from groundwire_aol.replacements import Activation, Init
from groundwire_aol.surgery import Conversion
from groundwire_aol.tracing import is_leaf


def lipschitz(
    module: nn.Module,
    example_input: Tensor | None = None,
    *,
    activation: Activation = "maxmin",
    steps: int = 1,
    init: Init = "orthogonal",
    exclude: Sequence[str] = (),
    input_std: Any = None,
    inplace: bool = False,
) -> tuple[nn.Module, list[str]]:
    r"""Turn a stock CNN or MLP into a 1-Lipschitz one, to be trained from here.

    Linear and convolution layers get AOL weights, ReLU and its like become MaxMin (or NActivation), BatchNorm becomes
    :class:`BatchCentering`, pools are rescaled to constant 1, sums of two branches become convex combinations,
    concatenations are divided by the root of the number of branches. Only what ``forward`` uses in evaluation changes.

    Args:
        module: A model whose ``forward`` takes one tensor and returns scores.
        example_input: A batch. When given, the result is proved with :func:`lipschitz_bound` before it is returned.
        activation: "maxmin", "nactivation", or None to keep the activations.
        steps: Of the rescale: 1, or 2 for the tighter rule.
        init: "orthogonal" begins from the orthogonal weights nearest to the present ones, without which signals would
            vanish; "keep" keeps present weights as raw weights, for a model that was trained under the same constraint.
        exclude: Paths of submodules to leave alone; the certificate then counts them as they are.
        input_std: Deviations that the data is divided by outside the model, noted in the list.
        inplace: Change ``module`` itself instead of a copy.

    Returns:
        The model and one line per change. The lines are empty for a model that is converted already.

    Raises:
        UnknownLipschitzError: An operation without a rule, with its path and a way out; nothing was changed.
        UnsoundError: A padding without a bound, weights that are not finite, or an input that fits not.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> model, changes = lipschitz(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(1, 4))
        >>> print(*changes[:3], sep="\n")
        0: Linear -> AOL weight of norm at most 1, orthogonal start
        1: ReLU -> MaxMin
        2: Linear -> AOL weight of norm at most 1, orthogonal start
    """
    module = module if inplace else copy.deepcopy(module)
    wrapped = nn.Sequential(module) if is_leaf(module) and aol_of(module) is None else module
    found = Conversion(wrapped, activation, steps, init, tuple(exclude))
    changes = found.apply()
    result = found.module
    if input_std is not None:
        factor = 1 / smallest_std(input_std)
        changes.append(
            f"inputs are divided by {input_std} before the model: certificates in pixels count L * {factor:.6g}"
        )
    if example_input is not None:
        bound = lipschitz_bound(result, example_input)
        if float(bound) > 1 + 1e-4 and not exclude:
            worst = ", ".join(f"{b.path} {b.constant:.4g}" for b in bound.layers if b.constant > 1 + 1e-4)
            changes.append(f"counted, not changed: {worst}")
        changes.append(f"proved: Lipschitz constant at most {float(bound):.8g}")
    return result, changes
