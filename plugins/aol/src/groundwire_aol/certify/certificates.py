"""Certified radii and accuracies: how far an input can move, in L2, without changing the prediction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from groundwire_aol.certify.bound import Bound
from groundwire_aol.certify.rounding import Rounding, not_standard
from groundwire_aol.errors import UnsoundError

#: The radii of the literature, in units of pixels in [0, 1].
RADII = (36 / 255, 72 / 255, 108 / 255, 1.0)
#: Default of an argument that must be given.
REQUIRED: Any = type("Required", (), {"__repr__": lambda _: "<required>"})()
#: Covers the rounding of the float64 arithmetic here.
_DOWN = 1 - 1e-12
_UP = 1 + 1e-12


def certified_radius(
    logits: Tensor,
    target: Tensor,
    lipschitz: Any = REQUIRED,
    *,
    input_std: Any = None,
    slack: Any = 0.0,
    last_layer: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    r"""Radius in L2 within which the prediction is certain to stay ``target``; 0 where it is not ``target``.

    ``r = (s_y - max_j s_j) / (sqrt(2) L)``: moving the input by less than r moves the difference of two scores by less
    than the margin. A prediction is certified at eps if ``r > eps``, strictly.

    Args:
        logits: Shape (B, K), K >= 2, floating.
        target: Shape (B,), integers in [0, K).
        lipschitz: Bound L of the model that made ``logits``: :func:`groundwire_aol.lipschitz_bound`'s result, or a
            number that you vouch for.
        input_std: Deviations that the data was divided by, outside the model. Radii are then in units of the undivided
            pixels: L is multiplied by ``1 / min(input_std)``.
        slack: What else the margin must cover, a number or a tensor (B,): errors of a score difference, both at the
            input and at the moved one.
        last_layer: Weight (K, d) of the final linear layer. L is then the bound of the model up to that layer, of
            ``lipschitz_bound(model, x, upto="path")``, and each pair of classes is divided by ``||w_y - w_j||`` instead
            of sqrt(2). A model whose last layer is a :class:`groundwire_aol.NormalizedLinear` needs no ``last_layer``:
            its Bound holds the rows.
        inputs: Shape (B, ...), what the scores were computed from; a few are computed again. The radius then covers the
            rounding of the forward pass, here and at every point within it: scores err by at most
            ``e(||x||) = offset + slope ||x||`` in L2 (``lipschitz.rounding``), so
            ``r = (margin - 2 sqrt(2) e(||x||)) / (sqrt(2) (L + slope))``. Without it, the certificate is one of exact
            arithmetic, of which a warning tells once.

    Returns:
        Shape (B,), float64, at least 0; 0 also for scores that are not finite.

    Raises:
        TypeError: ``lipschitz`` is left out.
        ValueError: Shapes, classes or dtypes do not fit, or ``last_layer`` is not the bound's.
        UnsoundError: L is not a positive finite number, or the weights changed since it was proved, so there is nothing
            to certify with; or ``inputs`` are given and the rounding has no bound, for this model or on this device,
            or the scores were computed in half precision.

    Example:
        >>> certified_radius(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), lipschitz=1.0)
        tensor([1.4142, 0.0000], dtype=torch.float64)
    """
    radii = radii_of(logits, target, lipschitz, input_std, slack, last_layer, inputs)
    if inputs is None and isinstance(lipschitz, Bound):
        _warn_of_exact_arithmetic()
    return radii


@cache
def _warn_of_exact_arithmetic() -> None:
    warnings.warn(
        "certified radii are of exact arithmetic: the rounding of the scores is not covered -> pass inputs=, what the "
        "scores were computed from",
        stacklevel=4,
    )


def radii_of(
    logits: Tensor,
    target: Tensor,
    lipschitz: Any,
    input_std: Any = None,
    slack: Any = 0.0,
    last_layer: Tensor | None = None,
    inputs: Tensor | None = None,
    verify: bool = True,
) -> Tensor:
    """Return what :func:`certified_radius` returns, without a word about arithmetic.

    ``verify=False`` leaves out to compute some of the scores again.
    """
    _check(logits, target)
    constant = total_lipschitz(lipschitz, input_std)
    weight = _last_weight(lipschitz, last_layer)
    if weight is not None and isinstance(lipschitz, Bound) and lipschitz.head is not None:
        constant = lipschitz.head.body / smallest_std(input_std)
    scores = logits.detach().double()
    own = scores.gather(1, target.view(-1, 1).long())
    margins = own - scores - torch.as_tensor(slack, dtype=torch.float64, device=scores.device).reshape(-1, 1)
    moved_by_rounding = 0.0
    if inputs is not None:
        rounding = _rounding(lipschitz, logits, inputs)
        if verify:
            _refuse_other_scores(lipschitz, logits, inputs)
        norms = inputs.detach().double().flatten(1).norm(dim=1) * _UP
        margins = margins - 2 * math.sqrt(2) * rounding.error(norms)[:, None]
        moved_by_rounding = math.sqrt(2) * rounding.slope / smallest_std(input_std)
    if weight is None:
        radii = margins / (math.sqrt(2) * constant + moved_by_rounding)
    else:
        pairs = _pair_norms(weight.to(scores.device), target, scores.shape[1])
        radii = margins / (constant * pairs + moved_by_rounding)
    radii = radii.scatter(1, target.view(-1, 1).long(), math.inf).amin(1) * _DOWN
    sound = torch.isfinite(scores).all(1) & torch.isfinite(radii)
    if inputs is not None:
        # Within the ball nothing may leave the range of the dtype either.
        sound &= torch.isfinite(rounding.error(norms + radii.clamp_min(0) / smallest_std(input_std)))
    return torch.where(sound, radii, 0.0).clamp_min(0.0)


def certified_accuracy(
    logits: Tensor,
    target: Tensor,
    eps: Sequence[float] = RADII,
    lipschitz: Any = REQUIRED,
    **options: Any,
) -> Tensor:
    """Fraction of samples that are predicted right and certified at each radius (strictly above it).

    Args:
        logits: Shape (B, K).
        target: Shape (B,).
        eps: Radii, each at least 0; 0 is the clean accuracy without ties.
        lipschitz: As for :func:`certified_radius`.
        options: As for :func:`certified_radius`.

    Returns:
        Shape (len(eps),), float64.

    Example:
        >>> certified_accuracy(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), (0.0, 1.0), lipschitz=1.0)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    radii = radii_of(logits, target, lipschitz, **options)
    return (radii[:, None] > check_radii(eps).to(radii.device)).double().mean(0)


def check_radii(eps: Sequence[float]) -> Tensor:
    """``eps`` as a float64 tensor.

    Raises:
        ValueError: A radius is negative or not finite, or there is none.
    """
    values = torch.tensor([float(e) for e in eps], dtype=torch.float64)
    if not len(values) or not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(f"eps must be radii of at least 0, such as (36 / 255, 1.0), got {tuple(eps)}")
    return values


def total_lipschitz(lipschitz: Any, input_std: Any = None) -> float:
    """Return the constant from undivided pixels to scores: ``L / min(input_std)``.

    Raises:
        TypeError: ``lipschitz`` was left out.
        UnsoundError: ``lipschitz`` is not a positive finite number, or was proved for other weights.
        ValueError: A deviation is not positive.

    Example:
        >>> total_lipschitz(1.0, (0.25, 0.5))
        4.0
    """
    if lipschitz is REQUIRED:
        raise TypeError(
            "a certificate needs the Lipschitz constant of the model -> lipschitz=lipschitz_bound(model, inputs), or "
            "lipschitz=1.0 if you know it to be that"
        )
    if isinstance(lipschitz, Bound) and lipschitz.weights.state() not in ("unchanged", "unchecked"):
        raise UnsoundError(
            f"{lipschitz.weights.state()} since the bound was proved -> lipschitz_bound(model, inputs) again"
        )
    try:
        constant = float(lipschitz)
    except (TypeError, ValueError) as error:
        raise UnsoundError(
            f"a certificate needs the model's Lipschitz constant, got {type(lipschitz).__name__} -> "
            "lipschitz=lipschitz_bound(model, example_input)"
        ) from error
    if not (math.isfinite(constant) and constant > 0):
        raise UnsoundError(f"a model with Lipschitz constant {constant} has no certificates -> lipschitz(model) first")
    return constant / smallest_std(input_std)


def smallest_std(input_std: Any) -> float:
    """Return the smallest of the deviations that the data was divided by; 1.0 for None."""
    if input_std is None:
        return 1.0
    values = torch.as_tensor(input_std, dtype=torch.float64).reshape(-1)
    if not len(values) or not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ValueError(f"input_std must be positive numbers, got {input_std!r}")
    return float(values.min())


def _last_weight(lipschitz: Any, last_layer: Tensor | None) -> Tensor | None:
    """Return the weight of the last layer, if certificates are per pair of classes and the bound is of the body."""
    if not isinstance(lipschitz, Bound):
        return last_layer
    head = lipschitz.head
    if last_layer is None and not lipschitz.upto:
        return None if head is None else head.weight
    if not lipschitz.upto or head is None:
        raise ValueError(
            "last_layer= needs the bound of the model up to that layer, and this one is of the whole model -> "
            'lipschitz=lipschitz_bound(model, inputs, upto="path of the layer")'
        )
    if last_layer is None:
        raise ValueError(
            f"this bound is of the model up to {lipschitz.upto} only -> last_layer={lipschitz.upto}.weight"
        )
    given = last_layer.detach().cpu().double()
    if given.shape != head.weight.shape or not torch.equal(given, head.weight):
        raise ValueError(f"last_layer= is not the weight of {lipschitz.upto} for which the bound was proved")
    return last_layer


def _rounding(lipschitz: Any, logits: Tensor, inputs: Tensor) -> Rounding:
    """Return the rounding of a bound, if it is about these scores."""
    if not isinstance(lipschitz, Bound):
        raise ValueError(
            f"inputs= needs the bound of the whole model, got {type(lipschitz).__name__} -> "
            "lipschitz=lipschitz_bound(model, inputs)"
        )
    found = lipschitz.rounding
    shape = (len(logits), *lipschitz.input_shape)
    if inputs.shape != shape or not inputs.dtype == logits.dtype == found.dtype:
        raise ValueError(
            f"inputs= must be what gave the logits, {found.dtype} of shape {shape}, got {inputs.dtype} "
            f"{tuple(inputs.shape)} and {logits.dtype} logits -> compute them without autocast"
        )
    reason = found.unknown or not_standard(logits.device) or half_precision(logits)
    if reason:
        raise UnsoundError(
            f"the rounding of the scores has no bound: {reason} -> leave inputs= out, or compute the scores on a CPU "
            "without autocast"
        )
    return found


#: Scores that are computed again.
ROWS = 4


def some_rows(batch: int) -> Tensor:
    """Return the numbers of a few rows of a batch, the first and the last among them.

    Example:
        >>> some_rows(10).tolist(), some_rows(2).tolist()
        ([0, 3, 6, 9], [0, 1])
    """
    return torch.linspace(0, batch - 1, min(ROWS, batch)).long()


def _refuse_other_scores(bound: Bound, logits: Tensor, inputs: Tensor) -> None:
    """Compute some scores again, and raise if the given ones are further away than rounding can move them."""
    model = bound.weights.module
    if model is None or not len(logits):
        return
    rows = some_rows(len(logits))
    modes = [(part, part.training) for part in model.modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            again = model(inputs[rows])
    finally:
        for part, training in modes:
            part.training = training
    given = logits.detach()[rows].double()
    norms = inputs[rows].detach().double().flatten(1).norm(dim=1)
    apart = (again.double() - given).norm(dim=1) if isinstance(again, Tensor) and again.shape == given.shape else None
    if apart is None or bool((apart > 2 * bound.rounding.error(norms) * _UP).any()):
        raise UnsoundError(
            "the scores are not those that the model computes for these inputs in evaluation, by more than rounding "
            "explains -> compute them as model.eval()(inputs), without autocast, or leave inputs= out"
        )


def half_precision(scores: Tensor) -> str:
    """Return why scores seem to have been computed in half precision; empty if they do not.

    Example:
        >>> half_precision(torch.tensor([[0.1, 0.2]])), half_precision(torch.tensor([[0.1, 0.2]]).bfloat16().float())
        ('', 'all scores are numbers of torch.bfloat16')
    """
    if torch.is_autocast_enabled(scores.device.type):
        return "autocast is active"
    dtype = half_dtype(scores)
    return f"all scores are numbers of {dtype}" if dtype is not None else ""


def half_dtype(scores: Tensor) -> torch.dtype | None:
    """Return the dtype of half precision of which all scores are numbers; None for small integers too."""
    if bool(((scores == scores.round()) & (scores.abs() <= 16)).all()):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if bool((scores.to(dtype).to(scores.dtype) == scores).all()):
            return dtype
    return None


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floats of shape (B, K) with K >= 2, got {logits.dtype} {tuple(logits.shape)}")
    if target.shape != logits.shape[:1] or target.is_floating_point():
        raise ValueError(f"target must be integers of shape ({len(logits)},), got {target.dtype} {tuple(target.shape)}")
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
        raise ValueError(
            f"target has classes {int(target.min())} to {int(target.max())}, but logits have {logits.shape[1]} classes "
            "-> give the model as many scores as there are classes"
        )


def _pair_norms(weight: Tensor, target: Tensor, classes: int) -> Tensor:
    if weight.dim() != 2 or len(weight) != classes:
        raise ValueError(
            f"last_layer must be the weight of a Linear layer with {classes} outputs, got {tuple(weight.shape)}"
        )
    rows = weight.detach().double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")[target.long()] * (1 + 1e-9)
