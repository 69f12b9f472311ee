"""The replayed step equals an independent loop, whatever the Trainer is asked to do."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from groundwire import hookimpl


def test_plain_step_equals_the_reference(kit):
    module = kit.Net()
    kit.fit(module, kit.SAM())
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data())) == 0.0


def test_the_reference_is_not_plain_training(kit):
    module = kit.Net()
    kit.fit(module)
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data())) > 1e-4


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulation_with_partial_last_window_and_clipping(kit, accumulate):
    module = kit.Net()
    kit.fit(module, kit.SAM(), accumulate_grad_batches=accumulate, gradient_clip_val=0.3)
    expected = kit.sam_loop(kit.data(), accumulate=accumulate, clip=0.3)
    assert kit.difference(module.net.state_dict(), expected) == 0.0


def test_bf16_mixed(kit):
    module = kit.Net()
    kit.fit(module, kit.SAM(), precision="bf16-mixed")
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data(), autocast=torch.bfloat16)) == 0.0


def test_standalone_package(kit):
    standalone = import_module("pytorch_lightning")

    class Module(standalone.LightningModule):
        __init__, forward = kit.Net.__init__, kit.Net.forward
        training_step, configure_optimizers = kit.Net.training_step, kit.Net.configure_optimizers

    Module.__init__ = _init(kit.network)
    module = Module()
    kit.fit(module, kit.SAM(), package=standalone)
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data())) == 0.0


def _init(network):
    def __init__(self):  # noqa: N807
        super(type(self), self).__init__()
        self.net = network()

    return __init__


class Odd:
    """Overrides of LightningModule methods that change nothing or skip something."""

    def step_dict(self, batch, i):
        return {"loss": self.loss(batch), "other": 1}

    def step_without_index(self, batch):
        return self.loss(batch)

    def step_mapping(self, batch, batch_idx):
        x, y = batch.pop("x"), batch.pop("y")
        return nn.functional.cross_entropy(self(x), y)

    def step_replacing_entries(self, batch, batch_idx):
        batch[0] = batch[0] * 1.0
        return self.loss(batch)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.step()

    def optimizer_step_passing(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


def loss(self, batch):
    return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("training_step", Odd.step_dict),
        ("training_step", Odd.step_without_index),
        ("training_step", Odd.step_replacing_entries),
        ("optimizer_step", Odd.optimizer_step_passing),
        ("optimizer_zero_grad", Odd.optimizer_zero_grad),
    ],
)
def test_overridden_methods(kit, name, override):
    module = type("Module", (kit.Net,), {name: override, "loss": loss})()
    kit.fit(module, kit.SAM())
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data())) == 0.0


def test_overridden_backward_is_used_in_the_replay_too(kit):
    class Module(kit.Net):
        def backward(self, value):
            (2 * value).backward()

    module = Module()
    kit.fit(module, kit.SAM())
    expected = kit.sam_loop(kit.data(), loss=lambda *a: 2 * nn.functional.cross_entropy(*a))
    assert kit.difference(module.net.state_dict(), expected) == 0.0


def test_dict_batches_that_the_step_empties(kit):
    class Dicts(torch.utils.data.Dataset):
        def __len__(self):
            return len(kit.data())

        def __getitem__(self, i):
            x, y = kit.data()[i]
            return {"x": x, "y": y}

    module = type("Module", (kit.Net,), {"training_step": Odd.step_mapping})()
    kit.fit(module, kit.SAM(), loader=DataLoader(Dicts(), 8))
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data())) == 0.0


def test_iterable_dataset_with_accumulation(kit):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(kit.data())

    module = kit.Net()
    kit.fit(module, kit.SAM(), loader=DataLoader(Stream(), 8), accumulate_grad_batches=2)
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data(), accumulate=2)) == 0.0


def test_batch_changed_in_on_train_batch_start_of_module_and_later_callback(kit):
    import lightning.pytorch as pl

    class Module(kit.Net):
        def on_train_batch_start(self, batch, batch_idx):
            batch[0] = batch[0] + 1

    class Later(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch[0] = batch[0] * 2

    module = Module()
    kit.fit(module, kit.SAM(), Later())
    dataset = kit.data()
    changed = torch.utils.data.TensorDataset(dataset.tensors[0] * 2 + 1, dataset.tensors[1])
    assert kit.difference(module.net.state_dict(), kit.sam_loop(changed)) == 0.0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_that_return_none_are_left_out(kit):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Module()
    kit.fit(module, kit.SAM(), accumulate_grad_batches=2)
    net, dataset = kit.network(), kit.data()
    optimizer = kit.sgd(net.parameters())
    batches = [dataset[i : i + 8] for i in range(0, 40, 8)]
    for window in (batches[:1], batches[2:4], batches[4:]):
        kit.sam_step(net, optimizer, window, 2)
    assert kit.difference(module.net.state_dict(), net.state_dict()) == 0.0


def test_lbfgs_calls_the_closure_many_times_and_stays_finite(kit):
    class Module(kit.Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module = Module()
    kit.fit(module, kit.SAM())
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_swa_whose_last_epoch_has_no_gradient(kit):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    calls = []

    class Counting(kit.SAM):
        @hookimpl
        def gw_gradient(self, step, run):
            calls.append(run.trainer.current_epoch)
            return super().gw_gradient(step, run)

    def steps(*plugins):
        averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
        return kit.fit(kit.Net(), *plugins, averaging, max_epochs=3).global_step

    assert steps(Counting()) == steps()
    assert calls == [0] * 5 + [1] * 5 + [2] * 5


def test_closure_first_and_then_the_step(kit):
    module = type("Module", (kit.Net,), {"optimizer_step": Odd.optimizer_step})()
    calls = []

    class Counting(kit.SAM):
        @hookimpl
        def gw_gradient(self, step, run):
            calls.append(len(step.micro_batches))
            return super().gw_gradient(step, run)

    kit.fit(module, Counting())
    assert calls == [1] * 5
