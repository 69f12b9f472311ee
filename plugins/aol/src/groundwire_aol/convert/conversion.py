"""A stock network as a 1-Lipschitz one, with a list of what was changed; what has no rule is refused, never guessed.

What becomes of each step is looked at first, so that a refusal leaves the model as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from groundwire_aol.certify.bound import lipschitz_bound
from groundwire_aol.certify.call import function_name
from groundwire_aol.certify.certificates import smallest_std
from groundwire_aol.certify.graph import is_leaf, trace
from groundwire_aol.certify.operations import FACTS, FUNCTIONS, hint, is_known_function
from groundwire_aol.certify.plain_copy import refuse_weights
from groundwire_aol.certify.score_module import is_lightning, score_module
from groundwire_aol.convert.branches import rewrite, sums_and_concatenations
from groundwire_aol.convert.replacements import Activation, Init, LastLayer, replacement, takes_weights
from groundwire_aol.errors import UnknownLipschitzError
from groundwire_aol.layers.initialisers import nearest_orthogonal_
from groundwire_aol.layers.parametrization import (
    CONVOLUTIONS,
    aol_of,
    constrain,
    geometry_of,
    has_unit_rows,
    normalize_rows,
)


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
    last_layer: LastLayer = "aol",
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
        last_layer: "normalized" gives the Linear layer that computes the scores rows of length 1, which are certified
            per pair of classes, see :class:`groundwire_aol.NormalizedLinear`.

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
    found = Conversion(wrapped, activation, steps, init, tuple(exclude), last_layer)
    changes = found.apply()
    result = found.module
    if input_std is not None:
        factor = 1 / smallest_std(input_std)
        changes.append(
            f"inputs are divided by {input_std} before the model: certificates in pixels count L * {factor:.6g}"
        )
    if example_input is not None:
        bound = lipschitz_bound(result, example_input)
        if float(bound) > 1 + 1e-4 and not exclude and bound.head is None:
            worst = ", ".join(f"{b.path} {b.constant:.4g}" for b in bound.layers if b.constant > 1 + 1e-4)
            changes.append(f"counted, not changed: {worst}")
        changes.append(f"proved: Lipschitz constant at most {float(bound):.8g}")
        if bound.head is not None:
            changes.append(
                f"proved: at most {bound.head.body:.8g} up to {bound.head.path}; certified per pair of classes"
            )
    return result, changes


class Conversion:
    """Looks at everything first, then changes: a refusal leaves the model as it was."""

    def __init__(
        self,
        module: nn.Module,
        activation: Activation,
        steps: int,
        init: Init,
        exclude: tuple[str, ...],
        last_layer: LastLayer = "aol",
    ) -> None:
        if activation not in ("maxmin", "nactivation", None):
            raise ValueError(f"activation must be 'maxmin', 'nactivation' or None, got {activation!r}")
        if init not in ("orthogonal", "keep"):
            raise ValueError(f"init must be 'orthogonal' or 'keep', got {init!r}")
        if steps not in (1, 2):
            raise ValueError(f"steps must be 1 or 2, got {steps!r}")
        if last_layer not in ("aol", "normalized"):
            raise ValueError(f"last_layer must be 'aol' or 'normalized', got {last_layer!r}")
        names = dict(module.named_modules())
        missing = [name for name in exclude if name not in names]
        if missing:
            raise ValueError(
                f"exclude names {', '.join(missing)}, which is no submodule -> choose of {', '.join(list(names)[1:])}"
            )
        self.module, self.activation, self.steps, self.init, self.exclude = module, activation, steps, init, exclude
        refuse_weights(module)
        self.prefix, core = score_module(module)
        training = {m: m.training for m in core.modules()}
        try:
            self.graph = trace(core.eval())
        finally:
            for part, mode in training.items():
                part.training = mode
        self.channels: dict[fx.Node, int | None] = {}
        self.new: dict[str, nn.Module | None] = {}
        self.lines: dict[str, str] = {}
        self.normalized = self.last_linear() if last_layer == "normalized" else ""

    def apply(self) -> list[str]:
        """Check everything, change everything, and tell."""
        blocks = sums_and_concatenations(self.graph, lambda path: self.excluded(self.path(path)))
        for node in self.graph.nodes:
            self.plan(node)
        graphs = {
            self.path(path): rewrite(self.module.get_submodule(self.path(path)), self.path(path)) for path in blocks
        }
        if "" in graphs and is_lightning(self.module):
            raise UnknownLipschitzError(
                type(self.module).__name__,
                "its own forward adds or concatenates branches, which cannot be changed in place",
                "move that part into a submodule",
            )
        for path, layer in self.new.items():
            self.change(path, layer)
        for path in sorted(graphs, key=lambda p: -p.count(".") - bool(p)):
            block = rewrite(self.module.get_submodule(path), path)
            self.lines[f"{path} (forward)"] = f"{path or 'forward'}: {blocks[self.bare(path)]}"
            if path:
                self.module.set_submodule(path, block)
            else:
                self.module = block
        return list(self.lines.values())

    def last_linear(self) -> str:
        """Return the path of the Linear layer that gives the scores.

        Raises:
            UnknownLipschitzError: Another step gives them.
        """
        [output] = [n for n in self.graph.nodes if n.op == "output"]
        last = output.args[0]
        path = self.path(str(last.target)) if isinstance(last, fx.Node) and last.op == "call_module" else ""
        if not path or not isinstance(self.module.get_submodule(path), nn.Linear):
            raise UnknownLipschitzError(
                path or type(self.module).__name__,
                "the scores are not given by a Linear layer, whose rows could be normalized",
                "use last_layer='aol'",
            )
        return path

    def path(self, bare: str) -> str:
        """Return a path in the traced part as one in the whole model."""
        return ".".join(filter(None, (self.prefix, bare)))

    def bare(self, path: str) -> str:
        """Return the inverse of :meth:`path`."""
        return path[len(self.prefix) :].lstrip(".") if self.prefix else path

    def excluded(self, path: str) -> bool:
        """Tell whether the user wants this part left alone."""
        return any(path == name or path.startswith(f"{name}.") or not name for name in self.exclude)

    def plan(self, node: fx.Node) -> None:
        """Plan what becomes of one step, or refuse it."""
        before = next((self.channels.get(n) for n in node.all_input_nodes), None)
        self.channels[node] = before
        if node.op == "call_module":
            path = self.path(str(node.target))
            layer = self.module.get_submodule(path)
            if isinstance(layer, (CONVOLUTIONS, nn.Linear)):
                self.channels[node] = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
            elif isinstance(layer, nn.Flatten | nn.Unflatten | nn.PixelShuffle | nn.PixelUnshuffle):
                self.channels[node] = None
            if not self.excluded(path):
                self.plan_layer(path, layer, before)
        elif node.op in ("call_function", "call_method"):
            self.channels[node] = before if _keeps_shape(function_name(node.target)) else None
            self.refuse_unknown(node)

    def refuse_unknown(self, node: fx.Node) -> None:
        """Raise for functions without any rule; whether their arguments have one, the certificate says."""
        name = function_name(node.target)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        owner = self.path(stack[-1][0] if stack else "")
        known = name in FUNCTIONS or name in FACTS or name == "getattr"
        if self.excluded(owner) or (known and is_known_function(node.target)):
            return
        if not _uses_input(node):
            return
        path = f"{owner}.{node.name}" if owner else node.name
        raise UnknownLipschitzError(path, f"{name} has no known Lipschitz constant", hint(name))

    def plan_layer(self, path: str, layer: nn.Module, channels: int | None) -> None:
        """Note what takes the place of a layer."""
        if path in self.new or has_unit_rows(layer):
            return
        if path == self.normalized:
            self.new[path] = None
            self.lines[path] = f"{path}: {type(layer).__name__} -> rows of length 1, certified per pair of classes"
            return
        found = replacement(path, layer, channels, self.activation, self.init)
        if found is not None:
            self.new[path] = found.layer
            self.lines[path] = f"{path}: {found.line}"

    def change(self, path: str, layer: nn.Module | None) -> None:
        """Do what was planned for one layer."""
        old = self.module.get_submodule(path)
        if layer is None:
            if self.init == "orthogonal":
                _start_orthogonal(old)
                if old.bias is not None:
                    nn.init.zeros_(old.bias)  # type: ignore[arg-type]
            if path == self.normalized:
                normalize_rows(old)
            else:
                constrain(old, self.steps)
            return
        layer.train(old.training)
        parameter = next(old.parameters(), next(self.module.parameters(), None))
        if parameter is not None:
            layer.to(parameter.device, parameter.dtype)
        if isinstance(old, nn.PReLU):
            layer.register_load_state_dict_pre_hook(_drop_slope)  # type: ignore[no-untyped-call]
        self.module.set_submodule(path, layer)


def _keeps_shape(name: str) -> bool:
    return name in FUNCTIONS and FUNCTIONS[name].constant is not None


def _start_orthogonal(layer: Any) -> None:
    """In place, as optimizers may hold the weight already; another parametrization takes it through its inverse."""
    geometry = geometry_of(layer)
    if not is_parametrized(layer, "weight"):
        nearest_orthogonal_(layer.weight, geometry)
    elif takes_weights(layer):
        layer.weight = nearest_orthogonal_(layer.weight.detach().clone(), geometry)


def _drop_slope(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A plain checkpoint has the slopes of the PReLU that was here."""
    state.pop(f"{prefix}weight", None)


def _uses_input(node: fx.Node) -> bool:
    """Tell whether a step depends on the model's input through anything but shapes."""
    seen, todo = set(), list(node.all_input_nodes)
    while todo:
        current = todo.pop()
        if current.op == "placeholder":
            return True
        if current not in seen and not (current.op == "call_method" and current.target in FACTS):
            seen.add(current)
            if not (current.target is getattr and current.args[1] in FACTS):
                todo += current.all_input_nodes
    return False
