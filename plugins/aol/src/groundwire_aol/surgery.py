"""Changing a whole model: what becomes of each step is looked at first, so that a refusal leaves it as it was."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from groundwire_aol import constants
from groundwire_aol.constraint import CONVOLUTIONS, constrain, geometry_of
from groundwire_aol.errors import UnknownLipschitzError
from groundwire_aol.function_rules import FUNCTION_RULES
from groundwire_aol.initialisers import nearest_orthogonal_
from groundwire_aol.operations import FACTS, HINTS, NONNEGATIVE
from groundwire_aol.replacements import Activation, Init, replacement, takes_weights
from groundwire_aol.residual import rewrite, sums_and_concatenations
from groundwire_aol.scoring_part import core_of, is_lightning, put
from groundwire_aol.tracing import refuse_weights, trace


class Conversion:
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
            self.module = block if not path else put(self.module, path, block)
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
        """Note what takes the place of a layer."""
        if path in self.new:
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
            constrain(old, self.steps)
            return
        layer.train(old.training)
        parameter = next(old.parameters(), next(self.module.parameters(), None))
        if parameter is not None:
            layer.to(parameter.device, parameter.dtype)
        if isinstance(old, nn.PReLU):
            layer.register_load_state_dict_pre_hook(_drop_slope)  # type: ignore[no-untyped-call]
        put(self.module, path, layer)


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
