"""Modules, parameters and hooks that a step registers: a second pass leaves none behind."""

import copy

import pytest
import torch
from programs_harness import Replay
from torch import nn
from torch.nn.utils import parametrize
from torchmetrics import MetricTracker
from torchmetrics.classification import MulticlassAccuracy

from groundwire import Plugins
from groundwire_bias_audit import BiasAudit
from groundwire_cram import CrAM

WRONG = "item 3: a module's own registries (_modules, _parameters, dicts of hooks) are not put back"


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hooks_of(module):
    kinds = [name for name in vars(module) if name.endswith("_hooks") and isinstance(getattr(module, name), dict)]
    return {name: len(getattr(module, name)) for name in kinds}


def structure(module):
    """What is registered where, and the hooks of each part."""
    parts = {name: (type(part).__name__, hooks_of(part)) for name, part in module.named_modules()}
    return parts, [name for name, _ in module.named_parameters()], [name for name, _ in module.named_buffers()]


class Base:
    """The steps of a net, each of which begins with what :meth:`register` does."""

    def training_step(self, batch, batch_idx):
        self.register(batch_idx)
        return super().training_step(batch, batch_idx)


def module_of(kit, register, build=lambda self: None):
    class Module(Base, kit.Net):
        def __init__(self):
            super().__init__()
            self.calls = 0
            build(self)

    Module.register = register
    return Module()


def append_metric(self, batch_idx):
    self.metrics.append(MulticlassAccuracy(3))


def insert_metric(self, batch_idx):
    self.named[f"step{len(self.named)}"] = MulticlassAccuracy(3)


def new_parameter(self, batch_idx):
    self.proto = nn.Parameter(0.9 * self.proto.detach() + 1, requires_grad=False)


def register_parameter(self, batch_idx):
    self.register_parameter(f"p{len(list(self.parameters()))}", nn.Parameter(torch.ones(2), requires_grad=False))


def new_buffer(self, batch_idx):
    self.register_buffer(f"b{len(list(self.buffers()))}", torch.ones(2))


def forward_hook(self, batch_idx):
    self.net.register_forward_hook(lambda module, arguments, output: None)


def pre_hook(self, batch_idx):
    self.net[0].register_forward_pre_hook(lambda module, arguments: None)


def backward_hook(self, batch_idx):
    self.net[3].register_full_backward_hook(lambda module, inputs, outputs: None)


def state_dict_hook(self, batch_idx):
    self.net._register_state_dict_hook(lambda module, state, prefix, metadata: None)


def add_module(self, batch_idx):
    self.add_module(f"part{len(list(self.children()))}", nn.Linear(2, 2))


def delete(self, batch_idx):
    if hasattr(self, "warm"):
        self.calls += 1
        del self.warm


def parametrization(self, batch_idx):
    if self.global_step == 0 and not parametrize.is_parametrized(self.side):
        parametrize.register_parametrization(self.side, "weight", Doubled())


def several_parametrizations(self, batch_idx):
    parametrize.register_parametrization(self.side, "weight", Doubled())


def case(register, build=lambda self: None, wrong=WRONG, ident=None):
    marks = [pytest.mark.xfail(strict=True, reason=wrong)] if wrong else []
    return pytest.param(register, build, id=ident or register.__name__, marks=marks)


def has(**parts):
    def build(self):
        for name, part in parts.items():
            setattr(self, name, copy.deepcopy(part))

    return build


REGISTERS = [
    case(append_metric, has(metrics=nn.ModuleList())),
    case(insert_metric, has(named=nn.ModuleDict())),
    case(new_parameter, has(proto=nn.Parameter(torch.zeros(2), requires_grad=False))),
    case(register_parameter),
    case(forward_hook),
    case(pre_hook),
    case(backward_hook),
    case(state_dict_hook),
    case(add_module),
    case(several_parametrizations, has(side=nn.Linear(2, 2))),
    case(new_buffer, wrong=None),
    case(delete, has(warm=nn.Linear(2, 2)), wrong=None),
    case(parametrization, has(side=nn.Linear(2, 2)), wrong=None),
]


@pytest.mark.parametrize(("register", "build"), REGISTERS)
def test_a_replay_registers_nothing(kit, register, build):
    seen = []
    for plugins in ([], [Replay()]):
        module = module_of(kit, register, build)
        kit.fit(module, *plugins)
        seen.append((structure(module), module.calls, module.state_dict()))
    assert seen[0][:2] == seen[1][:2]
    assert kit.difference(seen[0][2], seen[1][2]) == 0.0


@pytest.mark.parametrize(
    "plugin",
    [
        pytest.param(Replay, id="replay"),
        pytest.param(lambda: CrAM(0.5), id="CrAM", marks=pytest.mark.xfail(strict=True, reason=WRONG)),
        pytest.param(lambda: CrAM(0.0), id="SAM's move", marks=pytest.mark.xfail(strict=True, reason=WRONG)),
    ],
)
def test_a_teacher_that_is_copied_in_the_step_is_a_copy_of_the_weights_not_of_moved_ones(kit, plugin):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            self.before = copy.deepcopy(self.net.state_dict())
            self.teacher = copy.deepcopy(self.net)
            return super().training_step(batch, batch_idx)

    module = Module()
    kit.fit(module, plugin())
    learned = [name for name, _ in module.net.named_parameters()]
    teacher = module.teacher.state_dict()
    assert max(float((teacher[name] - module.before[name]).abs().max()) for name in learned) == 0.0


class Tracked:
    """Keeps the best of its epochs, with torchmetrics' tracker as its documentation shows it."""

    def build(self):
        self.tracker = MetricTracker(MulticlassAccuracy(3))

    def on_validation_epoch_start(self):
        self.tracker.increment()

    def validation_step(self, batch, batch_idx):
        self.tracker.update(self(batch[0]), batch[1])
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    "plugin",
    [lambda: CrAM((0.5, 0.9), evaluate_every=1), lambda: BiasAudit(lambda b: b[1] % 2, [0.5, 0.9], every_n_epochs=1)],
    ids=["CrAM", "BiasAudit"],
)
@pytest.mark.xfail(strict=True, reason=WRONG)
def test_a_metric_tracker_counts_the_users_epochs(kit, plugin):
    class Module(Tracked, kit.Net):
        def __init__(self):
            super().__init__()
            self.build()

    module = Module()
    options = {"max_epochs": 4, "num_sanity_val_steps": 0}
    kit.fit(module, Plugins([plugin()], report=False), val=kit.loader(), **options)
    assert module.tracker.n_steps == 4


def append_in_validation(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.metrics = nn.ModuleList()

        def on_validation_epoch_start(self):
            self.metrics.append(MulticlassAccuracy(3))
            self.handle = self.net.register_forward_hook(lambda *arguments: None)

        def validation_step(self, batch, batch_idx):
            self.metrics[-1].update(self(batch[0]), batch[1])
            super().validation_step(batch, batch_idx)

    return Module()


@pytest.mark.parametrize("which", ["metrics", "hooks"])
@pytest.mark.xfail(strict=True, reason=WRONG)
def test_evaluating_versions_registers_nothing(kit, which):
    module = append_in_validation(kit)
    plugin = Plugins([CrAM(0.5, evaluate_every=1)], report=False)
    kit.fit(module, plugin, val=kit.loader(), max_epochs=3, num_sanity_val_steps=0)
    found = {"metrics": len(module.metrics), "hooks": len(module.net._forward_hooks)}
    assert found[which] == 3
