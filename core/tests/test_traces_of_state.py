"""What a module keeps by itself is counted once, though its step runs twice, also after an exception."""

import random

import numpy as np
import pytest
import torch
import torchmetrics
from core_replaying_twice import Twice, both
from torch import nn

from groundwire import PluginError, hookimpl
from groundwire.undo.snapshot import Snapshot
from groundwire.undo.without_trace import without_trace


class Stateful:
    """All kinds of state that a training step may keep."""

    @staticmethod
    def make(kit):
        class Module(kit.Net):
            def __init__(self):
                super().__init__()
                self.register_buffer("pointer", torch.zeros(1))
                self.plain = torch.zeros(2)
                self.outs, self._private, self.counts = [], [], {"steps": 0, "nested": {"seen": []}}
                self.seen = set()
                self.n = 0
                self.metric = torchmetrics.MeanMetric()
                self.hidden = [torchmetrics.MeanMetric()]
                self.several = torchmetrics.MetricCollection(
                    [
                        torchmetrics.Accuracy("multiclass", num_classes=3),
                        torchmetrics.F1Score("multiclass", num_classes=3),
                    ]
                )
                self.cat = torchmetrics.CatMetric()

            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                self.pointer += 1
                self.plain.add_(1)
                self.outs.append(loss.detach())
                self._private.append(1)
                self.counts["steps"] += 1
                self.counts["nested"]["seen"].append(batch_idx)
                self.seen.add((self.current_epoch, batch_idx))
                self.n += 1
                self.late = self.n
                for metric in (self.metric, self.hidden[0], self.cat):
                    metric.update(loss.detach())
                self.several(self(batch[0]).detach(), batch[1])
                self.log("mean", self.metric)
                self.log_dict(self.several)
                return loss

            def on_train_epoch_end(self):
                self.final = float(self.hidden[0].compute()), len(self.cat.compute())

        return Module


def test_buffers_attributes_and_metrics_are_counted_once(kit):
    (plain, without), (ours, with_) = both(kit, Stateful.make(kit))
    for name in ("counts", "seen", "n", "late", "_private", "final"):
        assert getattr(plain, name) == getattr(ours, name), name
    assert [float(x) for x in plain.outs] == [float(x) for x in ours.outs]
    assert torch.equal(plain.plain, ours.plain)
    assert kit.difference(plain.state_dict(), ours.state_dict()) == 0.0
    assert without.callback_metrics == with_.callback_metrics


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.filterwarnings("ignore:.*an invalid")
def test_an_exception_inside_the_replay_restores_everything(kit, error):
    state = {}

    class Shaky(kit.SAM):
        @hookimpl
        def gw_gradient(self, step, run):
            if run.trainer.global_step < 2:
                return
            state.update({k: v.clone() for k, v in run.module.state_dict().items()})
            with step.perturbed() as weights:
                for weight in weights.values():
                    weight.add_(1)
                step.replay(loss_fn=self.fail)

        def fail(self, module, batch):
            module(batch[0])
            raise error

    module = kit.Net()
    trainer = kit.trainer(Shaky())
    before = set(vars(module)), set(vars(trainer.strategy))
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(module, kit.loader())
    assert kit.difference(state, module.state_dict()) == 0.0
    assert not {"log", "log_dict", "training_step", "configure_model"} & set(vars(module))
    assert "_build_kwargs" not in vars(trainer.fit_loop.epoch_loop)
    assert [type(c).__name__ for c in trainer.callbacks] == ["Shaky"]
    assert before[0] <= set(vars(module)) <= before[0] | {"_hparams"}


def test_a_tensor_edited_in_place_inside_a_list_is_refused(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.queue = [torch.zeros(1)]

        def training_step(self, batch, batch_idx):
            self.queue[0].add_(1)
            return super().training_step(batch, batch_idx)

    with pytest.raises(PluginError, match=r"Module\.queue.*register_buffer"):
        kit.fit(Module(), Twice())


def test_snapshot_restores_aliases_in_place():
    module = nn.Linear(2, 2)
    shared = [1]
    module.mine, module.table = shared, {"a": shared}
    snapshot = Snapshot(module)
    shared.append(2)
    module.table["b"] = 1
    module.new = 1
    module.mine = None
    snapshot.restore()
    assert module.mine is shared
    assert shared == [1]
    assert module.table == {"a": shared}
    assert not hasattr(module, "new")


def test_unseen_works_without_a_trainer():
    module = nn.Sequential(nn.BatchNorm1d(2))
    with without_trace(module):
        module(torch.ones(4, 2))
        torch.rand(1)
    assert int(module[0].num_batches_tracked) == 0


class Meter:
    """An average meter as people write it."""

    def __init__(self):
        self.n, self.values = 0, []

    def update(self, value):
        self.n += 1
        self.values.append(value)


def test_meters_arrays_and_generators_of_the_module_are_used_once(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.meter, self.meters = Meter(), {"a": Meter()}
            self.array = np.zeros(2)
            self.generators = [torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)]
            self.state = np.random.RandomState(0)

        def training_step(self, batch, batch_idx):
            self.meter.update(batch_idx)
            self.meters["a"].update(batch_idx)
            self.array += 1
            torch_one, numpy_one, python_one = self.generators
            noise = torch.randn(batch[0].shape, generator=torch_one)
            scale = numpy_one.random() + python_one.random() + self.state.rand()
            return super().training_step([batch[0] + scale * noise, batch[1]], batch_idx)

    (plain, _), (ours, _) = both(kit, Module)
    assert (plain.meter.n, plain.meter.values) == (ours.meter.n, ours.meter.values)
    assert plain.meters["a"].n == ours.meters["a"].n == 15
    assert plain.array.tolist() == ours.array.tolist()
    assert kit.difference(plain.state_dict(), ours.state_dict()) == 0.0


def test_long_containers_are_cut_back_to_their_length():
    module = nn.Linear(1, 1)
    module.words = {str(i): i for i in range(20_000)}
    module.rows = list(range(20_000))
    snapshot = Snapshot(module)
    module.words["new"] = 1
    module.rows += [1, 2]
    snapshot.restore()
    assert len(module.words) == len(module.rows) == 20_000
