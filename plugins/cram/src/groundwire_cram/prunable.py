"""Prunable parameters: the weights of layers, less what the user's ``skip`` names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from groundwire_cram.operators import Layout, Weights
from groundwire_cram.threshold import exact_masks

#: A pattern such as "net.0" or "*.downsample.*", or a predicate of name and tensor; or several of them.
#: Sequences stand before predicates, so that jsonargparse can write a list into the config.yaml of LightningCLI.
Skip = str | Sequence[str | Callable[[str, Tensor], bool]] | Callable[[str, Tensor], bool]

_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_KIN = ("Linear", "Conv", "Embedding")
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
#: What the weight of a weight-normalised layer is made of, and of one that torch.nn.utils.prune masks.
_MADE_OF = {"weight_g": "weight", "weight_v": "weight", "weight_orig": "weight"}


class Prunability(NamedTuple):
    """Verdict on one parameter.

    Attributes:
        name: As in ``named_parameters``.
        shape: Of the parameter.
        pruned: Whether it is compressed.
        reason: Why, or why not.
    """

    name: str
    shape: tuple[int, ...]
    pruned: bool
    reason: str


def describe(module: nn.Module | Mapping[str, Tensor], skip: Skip = (), compat: str | None = None) -> list[Prunability]:
    """Say of each parameter whether it is compressed, and why.

    Compressed are the floating-point weights of Linear, convolution and embedding layers (also of other libraries, by
    the name of their class), ``weight_*`` of recurrent layers, the projections of attention, and a module's own
    ``weight`` of two or more dimensions, unless the module normalises (by its class or the name of it) or the weight
    is a vector in disguise, with at most one dimension above 1. Scales, tokens and tables of positions that a module
    holds as parameters of its own are no weights of a layer.

    Args:
        module: Any module; or tensors by name, of whose modules nothing is known: then the published rule holds.
        skip: Patterns (``*``, ``?``, ``[...]``) of a parameter's name or of the name of a module that holds it, and
            predicates ``skip(name, tensor) -> bool``.
        compat: "reference" for the published rule: everything that has more than one dimension.

    Raises:
        ValueError: A module is lazy, so that a parameter has no shape yet.

    Example:
        >>> for row in describe(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm([2, 2]))):
        ...     print(row.name, row.pruned, row.reason)
        0.weight True weight of Linear
        0.bias False has fewer than two dimensions
        1.weight False LayerNorm normalises
        1.bias False LayerNorm normalises
    """
    rules = [skip] if isinstance(skip, str) or callable(skip) else list(skip)
    parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else module
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet -> run one batch through the module first: module(batch)")
    verdicts = _by_layer(module) if isinstance(module, nn.Module) and compat is None else {}
    rows = []
    for name, parameter in parameters.items():
        pruned, reason = True, "has more than one dimension"
        if not parameter.is_floating_point():
            pruned, reason = False, f"is of {parameter.dtype}"
        elif id(parameter) in verdicts:
            pruned, reason = verdicts[id(parameter)]
        elif parameter.dim() < 2:
            pruned, reason = False, "has fewer than two dimensions"
        if pruned and any(_skipped(rule, name, parameter) for rule in rules):
            pruned, reason = False, "named by skip"
        rows.append(Prunability(name, tuple(parameter.shape), pruned, reason))
    return rows


def _by_layer(module: nn.Module) -> dict[int, tuple[bool, str]]:
    """Judge each parameter by the layers that hold it; a tied one is pruned if one of them is to be pruned."""
    verdicts: dict[int, tuple[bool, str]] = {}
    for layer, name, parameter in _held(module):
        verdict = _judged(layer, name, parameter)
        if not verdicts.get(id(parameter), (False, ""))[0]:
            verdicts[id(parameter)] = verdict
    return verdicts


def _held(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield each parameter with the layer that uses it and its name there, also where it is parametrized."""
    modules = dict(module.named_modules(remove_duplicate=False))
    for path, layer in modules.items():
        owner, attribute = layer, ""
        if isinstance(layer, ParametrizationList):
            parent, _, attribute = path.rpartition(".")
            owner = modules[parent.rpartition(".")[0]]
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                yield owner, attribute or _MADE_OF.get(name, name), parameter


def _judged(layer: nn.Module, name: str, parameter: Tensor) -> tuple[bool, str]:
    """Say whether a parameter of this name in this layer is compressed, and why."""
    kind = type(layer).__name__
    if parameter.dim() < 2 and not isinstance(layer, _NORMALISATIONS):
        return False, "has fewer than two dimensions"
    if isinstance(layer, _RECURRENT):
        return name.startswith("weight_"), f"{name} of {kind}"
    if name in _ATTENTION:
        return True, f"{name} of {kind}"
    if isinstance(layer, _NORMALISATIONS):
        return False, f"{kind} normalises"
    if name != "weight":
        return False, f"{name} of {kind} is not the weight of a layer"
    if isinstance(layer, _LAYERS):
        return True, f"weight of {kind}"
    if "Norm" in kind:
        return False, f"{kind} normalises, by its name"
    if any(kin in kind for kin in _KIN):
        return True, f"weight of {kind}"
    if sum(size > 1 for size in parameter.shape) < 2:
        return False, f"weight of {kind} has at most one dimension above 1"
    return True, f"weight of {kind}"


def selected(module: nn.Module | Mapping[str, Tensor], skip: Skip = (), compat: str | None = None) -> list[str]:
    """Return the names of what is compressed (:func:`describe` says why).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
        >>> selected(net), selected(net, "0"), selected(net, lambda name, p: name.startswith("2"))
        (['0.weight', '2.weight'], ['2.weight'], ['0.weight'])
    """
    return [row.name for row in describe(module, skip, compat) if row.pruned]


def check_selection(module: nn.Module | Mapping[str, Tensor], skip: Skip = (), compat: str | None = None) -> list[str]:
    """Return :func:`selected`, after looking whether it makes sense.

    Raises:
        ValueError: Nothing is selected, a pattern of ``skip`` names nothing prunable, or a selected weight is not
            what its layer uses: weight-normalised (a direction of zeros has no length to divide by), masked, or under
            a parametrization that does not keep zeros.

    Example:
        >>> check_selection(nn.Linear(2, 2))
        ['weight']
    """
    rows = describe(module, (), compat)
    names = [row.name for row in rows if row.pruned]
    if not names:
        many = [f"{row.name}: {row.reason}" for row in rows if len(row.shape) > 1]
        reason = f"is the weight of a layer ({'; '.join(many)})" if many else "has more than one dimension"
        raise ValueError(
            f"there is nothing to prune: of {len(rows)} parameters none {reason} -> use it on a model with linear, "
            "convolutional or embedding layers"
        )
    for rule in [skip] if isinstance(skip, str) or callable(skip) else skip:
        if isinstance(rule, str) and not any(_named(name, rule) for name in names):
            raise ValueError(
                f"skip={rule!r} names no prunable parameter -> use the name of one or of its module: {names}"
            )
    chosen = selected(module, skip, compat)
    if not chosen:
        raise ValueError(f"skip={skip!r} leaves nothing to prune of {names} -> skip less")
    for name in chosen:
        obstacle = _obstacle(module, name)
        if obstacle is not None:
            raise ValueError(f"{name}: {obstacle}, or name it in skip")
    return chosen


def _obstacle(module: nn.Module | Mapping[str, Tensor], name: str) -> str | None:
    """Say why zeros in a parameter would not be zeros of the weight that its layer uses, and what to do; or None."""
    if re.search(r"(\.original\d|weight_[gv])$", name):
        return (
            "a weight-normalised layer cannot be pruned, zeros would give NaN -> remove_parametrizations "
            "(or remove_weight_norm) first"
        )
    if not isinstance(module, nn.Module):
        return None
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if attribute.endswith("_orig"):
        weight = attribute.removesuffix("_orig")
        if f"{weight}_mask" in owner._buffers:
            return f"torch.nn.utils.prune masks it -> torch.nn.utils.prune.remove(layer, {weight!r}) first"
        return "a hook computes the weight from it -> remove the hook, or use torch.nn.utils.parametrizations, first"
    return _lost_zeros(owner) if isinstance(owner, ParametrizationList) else None


def _lost_zeros(parametrizations: ParametrizationList) -> str | None:
    """Try with half of the entries set to zero whether they are zeros in the weight as used."""
    names = " and ".join(type(parametrization).__name__ for parametrization in parametrizations)
    twin: Any = copy.deepcopy(parametrizations).eval()
    with torch.no_grad():
        zeros = ~exact_masks({"": twin.original}, 0.5)[""]
        twin.original.masked_fill_(zeros, 0)
        used = twin()
    if used.shape == zeros.shape and not used[zeros].any():
        return None
    kept = float((used == 0).float().mean())
    return (
        f"{names} does not keep zeros: with {100 * float(zeros.float().mean()):.0f} % zeros in it, the weight as used "
        f"has {100 * kept:.0f} % -> torch.nn.utils.parametrize.remove_parametrizations first"
    )


def weights_of(module: nn.Module, names: Sequence[str], compat: str | None = None) -> Weights:
    """Return the parameters of these names, with the layouts of those whose inputs are not dimension 1.

    Example:
        >>> weights_of(nn.ConvTranspose1d(4, 6, 1, groups=2), ["weight"]).layouts
        {'weight': Layout(inputs=0, groups=2)}
    """
    parameters = dict(module.named_parameters())
    return Weights({name: parameters[name] for name in names}, {} if compat else layouts(module), bool(compat))


def layouts(module: nn.Module) -> dict[str, Layout]:
    """Return where the inputs of the product are, by parameter name, for layers that do not have them as dimension 1.

    These are transposed convolutions, (in, out / groups, ...), and the Conv1D of transformers, (in, out).
    """
    known: dict[int, Layout] = {}
    for layer, name, parameter in _held(module):
        if name == "weight" and isinstance(layer, _ConvTransposeNd):
            known[id(parameter)] = Layout(0, layer.groups)
        elif name == "weight" and type(layer).__name__ == "Conv1D" and parameter.dim() == 2:
            known[id(parameter)] = Layout(0)
    return {name: known[id(p)] for name, p in module.named_parameters() if id(p) in known}


def _skipped(rule: str | Callable[[str, Tensor], bool], name: str, parameter: Tensor) -> bool:
    return _named(name, rule) if isinstance(rule, str) else bool(rule(name, parameter))


def _named(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
