"""A stock network as a 1-Lipschitz one, with a list of what was changed; what has no rule is refused, never guessed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, fx, nn

from groundwire_aol import constants
from groundwire_aol.activations import MaxMin, NActivation
from groundwire_aol.bound import lipschitz_bound
from groundwire_aol.centering import BatchCentering, GlobalAvgPool, Rescaled
from groundwire_aol.certificates import smallest_std
from groundwire_aol.constraint import CONVOLUTIONS, computes_linear, constrain, geometry_of
from groundwire_aol.errors import UnknownLipschitzError, UnsoundError
from groundwire_aol.function_rules import FUNCTION_RULES
from groundwire_aol.initialisers import nearest_orthogonal_
from groundwire_aol.operations import (
    BATCHNORMS,
    FACTS,
    HINTS,
    INTERPOLATIONS,
    MAX_POOLS,
    NONNEGATIVE,
    NONNEGATIVE_LAYERS,
)
from groundwire_aol.parametrization import aol_of
from groundwire_aol.residual import rewrite, sums_and_concatenations
from groundwire_aol.tracing import is_leaf, refuse_weights, trace

Activation: TypeAlias = Literal["maxmin", "nactivation"] | None
Init: TypeAlias = Literal["orthogonal", "keep"]

#: Replaced by MaxMin or NActivation. Tanh, Sigmoid and the like stay: somebody chose them for their range.
REPLACED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish,
    nn.Softplus,
)  # fmt: skip
_AVG_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_GLOBAL_POOLS = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}


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
    found = _Conversion(wrapped, activation, steps, init, tuple(exclude))
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


class _Conversion:
    """Looks at everything first, then changes: a refusal leaves the model as it was."""

    def __init__(
        self, module: nn.Module, activation: Activation, steps: int, init: Init, exclude: tuple[str, ...]
    ) -> None:
        if activation not in ("maxmin", "nactivation", None):
            raise ValueError(f"activation must be 'maxmin', 'nactivation' or None, got {activation!r}")
        if init not in ("orthogonal", "keep"):
            raise ValueError(f"init must be 'orthogonal' or 'keep', got {init!r}")
        if steps not in (1, 2):
            raise ValueError(f"steps must be 1 or 2, got {steps!r}")
        names = dict(module.named_modules())
        missing = [name for name in exclude if name not in names]
        if missing:
            raise ValueError(
                f"exclude names {', '.join(missing)}, which is no submodule -> choose of {', '.join(list(names)[1:])}"
            )
        self.module, self.activation, self.steps, self.init, self.exclude = module, activation, steps, init, exclude
        refuse_weights(module)
        self.prefix, core = core_of(module)
        training = {m: m.training for m in core.modules()}
        try:
            self.graph = trace(core.eval())
        finally:
            for part, mode in training.items():
                part.training = mode
        self.channels: dict[fx.Node, int | None] = {}
        self.new: dict[str, nn.Module | None] = {}
        self.lines: dict[str, str] = {}

    def apply(self) -> list[str]:
        """Check everything, change everything, and tell."""
        blocks = sums_and_concatenations(self.graph, lambda path: self.excluded(self.path(path)))
        for node in self.graph.nodes:
            self.look(node)
        graphs = {
            self.path(path): rewrite(self.module.get_submodule(self.path(path)), self.path(path)) for path in blocks
        }
        if "" in graphs and _is_lightning(self.module):
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
            self.module = block if not path else _put(self.module, path, block)
        return list(self.lines.values())

    def path(self, bare: str) -> str:
        """A path in the traced part as one in the whole model."""
        return ".".join(filter(None, (self.prefix, bare)))

    def bare(self, path: str) -> str:
        """The inverse of :meth:`path`."""
        return path[len(self.prefix) :].lstrip(".") if self.prefix else path

    def excluded(self, path: str) -> bool:
        """Whether the user wants this part left alone."""
        return any(path == name or path.startswith(f"{name}.") or not name for name in self.exclude)

    def look(self, node: fx.Node) -> None:
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
                self.plan(path, layer, before)
        elif node.op in ("call_function", "call_method"):
            self.channels[node] = before if constants.name_of(node.target) in constants.FUNCTIONS else None
            self.refuse_unknown(node)

    def refuse_unknown(self, node: fx.Node) -> None:
        """Raise for functions without any rule; whether their arguments have one, the certificate says."""
        name = constants.name_of(node.target)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        owner = self.path(stack[-1][0] if stack else "")
        tables: tuple[Any, ...] = (FUNCTION_RULES, constants.FUNCTIONS, NONNEGATIVE, FACTS, ("getattr",))
        known = any(name in table for table in tables)
        if self.excluded(owner) or (known and constants.is_known_function(node.target)):
            return
        if not _uses_input(node):
            return
        path = f"{owner}.{node.name}" if owner else node.name
        raise UnknownLipschitzError(path, f"{name} has no known Lipschitz constant", HINTS.get(name, "replace it"))

    def plan(self, path: str, layer: nn.Module, channels: int | None) -> None:
        """What takes the place of a layer: None for "AOL weight", nothing for "stays"."""
        if aol_of(layer) is not None or path in self.new:
            return
        name = type(layer).__name__
        if computes_linear(layer):
            try:
                geometry_of(layer)
            except UnsoundError as error:
                raise UnsoundError(f"{path}: {error}") from error
            start = ", orthogonal start" if self.init == "orthogonal" else ""
            self.replace(path, None, f"{name} -> AOL weight of norm at most 1{start}")
        elif type(layer) in REPLACED and self.activation is not None:
            self.plan_activation(path, layer, channels)
        elif type(layer) in BATCHNORMS:
            self.replace(path, self.centering(layer), f"{name} -> BatchCentering: the division has no bound")
        elif type(layer) in MAX_POOLS:
            self.plan_max_pool(path, layer)
        elif type(layer) in _AVG_POOLS or type(layer) in _GLOBAL_POOLS:
            self.plan_avg_pool(path, layer)
        elif isinstance(layer, nn.Upsample):
            self.plan_upsample(path, layer)
        elif not _stays(layer):
            raise UnknownLipschitzError(
                path, f"{name} has no known Lipschitz constant", HINTS.get(name, "replace it, or name it in exclude")
            )

    def replace(self, path: str, layer: nn.Module | None, line: str) -> None:
        """Note one change."""
        self.new[path] = layer
        self.lines[path] = f"{path}: {line}"

    def plan_activation(self, path: str, layer: nn.Module, channels: int | None) -> None:
        """MaxMin needs pairs, NActivation the number of channels."""
        name = type(layer).__name__
        if self.activation == "nactivation":
            if channels is None:
                raise UnknownLipschitzError(path, "the number of its channels is unknown", "use activation='maxmin'")
            self.replace(path, NActivation(channels), f"{name} -> NActivation")
            return
        if channels is not None and channels % 2:
            raise UnknownLipschitzError(
                path,
                f"MaxMin needs an even number of channels, got {channels}",
                "make the layer before it wider by one, or use activation='nactivation'",
            )
        self.replace(path, MaxMin(), f"{name} -> MaxMin")

    def centering(self, norm: Any) -> BatchCentering:
        """BatchNorm's mean and bias, unless training begins anew."""
        new = BatchCentering(norm.num_features, norm.momentum if norm.momentum is not None else 0.1, bias=norm.affine)
        if self.init == "keep" and norm.running_mean is not None:
            new.running_mean.copy_(norm.running_mean)
        if self.init == "keep" and new.bias is not None:
            new.bias.data.copy_(norm.bias.detach())
        return new

    def plan_max_pool(self, path: str, layer: Any) -> None:
        """Windows that overlap count pixels more than once."""
        constant = constants.of_max_pool(layer.kernel_size, layer.stride, layer.dilation, MAX_POOLS[type(layer)])
        if layer.return_indices:
            raise UnknownLipschitzError(path, "indices are no continuous function", "use return_indices=False")
        if constant > 1:
            name = type(layer).__name__
            self.replace(path, Rescaled(layer, 1 / constant), f"{name} -> divided by its constant {constant:g}")

    def plan_avg_pool(self, path: str, layer: Any) -> None:
        """Averaging shrinks: multiplied so that a constant image keeps its length."""
        name = type(layer).__name__
        if type(layer) in _GLOBAL_POOLS:
            if set(constants.per_axis(layer.output_size, _GLOBAL_POOLS[type(layer)])) == {1}:
                self.replace(
                    path, GlobalAvgPool(_GLOBAL_POOLS[type(layer)]), f"{name}(1) -> sum over the root of the size"
                )
            return
        axes = _AVG_POOLS[type(layer)]
        size, stride, padding = (constants.per_axis(v, axes) for v in (layer.kernel_size, layer.stride, layer.padding))
        plain = (
            size == stride
            and not any(padding)
            and not layer.ceil_mode
            and getattr(layer, "divisor_override", None) is None
        )
        factor = math.sqrt(math.prod(size))
        if plain and factor > 1:
            self.replace(
                path,
                Rescaled(layer, factor),
                f"{name} -> times {factor:g}, so that its constant is 1 and not 1/{factor:g}",
            )

    def plan_upsample(self, path: str, layer: nn.Upsample) -> None:
        """Copies of a pixel count as often as they are made."""
        factor = layer.scale_factor
        if layer.mode not in INTERPOLATIONS:
            raise UnknownLipschitzError(
                path, f"mode {layer.mode!r} has negative weights", "use 'nearest' or 'bilinear'"
            )
        if isinstance(factor, int | float) and float(factor).is_integer() and not layer.align_corners:
            axes = {"linear": 1, "bilinear": 2, "trilinear": 3}.get(layer.mode, 2)
            constant = math.sqrt(float(factor) ** axes)
            self.replace(path, Rescaled(layer, 1 / constant), f"Upsample -> divided by its constant {constant:g}")

    def change(self, path: str, layer: nn.Module | None) -> None:
        """Do what was planned for one layer."""
        old = self.module.get_submodule(path)
        if layer is None:
            geometry = geometry_of(old)
            if self.init == "orthogonal":
                nearest_orthogonal_(old.weight, geometry)  # type: ignore[arg-type]
                if old.bias is not None:
                    nn.init.zeros_(old.bias)  # type: ignore[arg-type]
            constrain(old, self.steps)
            return
        layer.train(old.training)
        parameter = next(old.parameters(), next(self.module.parameters(), None))
        if parameter is not None:
            layer.to(parameter.device, parameter.dtype)
        if isinstance(old, nn.PReLU):
            layer.register_load_state_dict_pre_hook(_drop_slope)  # type: ignore[no-untyped-call]
        _put(self.module, path, layer)


def _drop_slope(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A plain checkpoint has the slopes of the PReLU that was here."""
    state.pop(f"{prefix}weight", None)


def _uses_input(node: fx.Node) -> bool:
    """Whether a step depends on the model's input through anything but shapes."""
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


def _stays(layer: nn.Module) -> bool:
    known = type(layer) in constants.MODULES or constants.of_activation(layer) is not None
    return known or type(layer) in NONNEGATIVE_LAYERS or type(layer).__module__.startswith("groundwire_aol.")


def _put(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    if isinstance(holder, nn.Sequential | nn.ModuleList):
        holder._modules[name] = new
    else:
        setattr(holder, name, new)
    return module


def _is_lightning(module: nn.Module) -> bool:
    return hasattr(module, "training_step") and hasattr(module, "configure_optimizers")


def has_weights(module: nn.Module) -> bool:
    """Whether there is anything that could be converted.

    Example:
        >>> has_weights(nn.Sequential(nn.ReLU()))
        False
    """
    return any(isinstance(part, nn.Linear | nn.modules.conv._ConvNd) for part in module.modules())


def core_of(module: nn.Module) -> tuple[str, nn.Module]:
    """The part that computes scores: ``module``, or the only child with weights of a LightningModule without forward.

    Raises:
        UnknownLipschitzError: There is no such part.
    """
    home = (getattr(type(module).forward, "__module__", "") or "").split(".")[0]
    if not _is_lightning(module) or home not in ("lightning", "pytorch_lightning", "torch"):
        return "", module
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    if len(children) != 1:
        names = ", ".join(name for name, _ in children) or "none"
        raise UnknownLipschitzError(
            type(module).__name__,
            f"it has no forward, and its submodules with weights are: {names}",
            "define forward(self, x) so that it returns the scores",
        )
    return children[0]
