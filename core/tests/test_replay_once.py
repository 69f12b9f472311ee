"""What a step does beside its gradient happens once, though it runs twice; what cannot be repeated is refused."""

import pytest
import torch
from torch import nn

from groundwire import Plugin, PluginError, hookimpl


def test_a_tensor_edited_in_place_by_the_step_is_refused(kit):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(2)
            return super().training_step(batch, batch_idx)

    with pytest.raises(PluginError, match=r"batch 0 in place .*clone"):
        kit.fit(Module(), kit.SAM())


def test_dataloader_iter_steps_are_refused_before_training(kit):
    class Module(kit.Net):
        def training_step(self, dataloader_iter):
            raise AssertionError("training must not start")

    with pytest.raises(PluginError, match=r"sam: .*dataloader_iter"):
        kit.fit(Module(), kit.SAM())


def test_micro_batches_of_namedtuples_and_dataclasses_are_copied_shallowly():
    import dataclasses
    from typing import NamedTuple

    from groundwire.batch import copy_containers

    class Pair(NamedTuple):
        x: list
        y: int

    @dataclasses.dataclass(frozen=True)
    class Record:
        values: dict

    batch = {"pair": Pair([1], 2), "record": Record({"a": [1]})}
    twin = copy_containers(batch)
    batch["pair"].x.append(9)
    batch["record"].values["a"].append(9)
    assert twin == {"pair": Pair([1], 2), "record": Record({"a": [1]})}
    assert isinstance(twin["pair"], Pair)


def test_a_momentum_teacher_that_the_step_updates_is_updated_once(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.teacher = kit.network().requires_grad_(False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    t.lerp_(p, 0.1)
            return super().training_step(batch, batch_idx)

    class Twice(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            step.replay()

    plain, ours = Module(), Module()
    kit.fit(plain)
    kit.fit(ours, Twice())
    assert kit.difference(plain.state_dict(), ours.state_dict()) == 0.0


def test_a_teacher_whose_updates_begin_late_is_updated_once(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Parameter(torch.zeros(1), requires_grad=False)

        def training_step(self, batch, batch_idx):
            if batch_idx >= 2:
                with torch.no_grad():
                    self.teacher.add_(1)
            return super().training_step(batch, batch_idx)

    module = Module()
    kit.fit(module, kit.SAM(), accumulate_grad_batches=2)
    assert module.teacher.item() == 3


def test_a_parameter_that_only_the_second_pass_edits_is_refused(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Parameter(torch.zeros(1), requires_grad=False)

        def training_step(self, batch, batch_idx):
            if "log" in vars(self):
                with torch.no_grad():
                    self.teacher.add_(1)
            return super().training_step(batch, batch_idx)

    with pytest.raises(PluginError, match=r"changed the parameter 'teacher' in place when it ran again"):
        kit.fit(Module(), kit.SAM())
