"""The replayed step equals an independent loop, whatever the Trainer is asked to do."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from groundwire import Plugin, PluginError, hookimpl


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
    standalone = pytest.importorskip("pytorch_lightning")

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


def test_parameters_without_gradient_and_frozen_ones_stay(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.net[0].weight.requires_grad_(False)

    module = Module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    kit.fit(module, kit.SAM())
    after = module.state_dict()
    for name in ("unused.weight", "unused.bias", "net.0.weight"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["net.3.weight"], after["net.3.weight"])


def test_tied_weights_are_moved_once(kit):
    seen = []

    class Spy(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            seen.append(sorted(step.parameters))

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.twin = self.net[0]

    kit.fit(Module(), Spy())
    assert len(seen) == 5
    assert all(len(names) == 6 for names in seen)


def test_gradient_edits_come_after_the_owner_and_before_clipping(kit):
    norms = []

    class Half(Plugin):
        @hookimpl
        def gw_gradient_edit(self, step):
            for grad in step.grads.values():
                grad.mul_(0.5)

    class Module(kit.Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norms.append(float(kit.total_norm([p.grad for p in self.parameters()])))

    kit.fit(Module(), kit.SAM(), max_steps=1)
    kit.fit(Module(), Half(), kit.SAM(), max_steps=1)
    assert norms[1] == pytest.approx(norms[0] / 2)


def test_every_gradient_watcher_sees_the_final_gradient(kit):
    import lightning.pytorch as pl

    seen = []

    class Watcher(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([p.grad.clone() for p in pl_module.parameters()])

    kit.fit(kit.Net(), Watcher(), kit.SAM(), Watcher(), max_steps=1)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    kit.fit(kit.Net(), Watcher(), max_steps=1)
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))


def test_nonfinite_gradients_skip_the_replay_and_are_reported(kit):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            value = super().training_step(batch, batch_idx)
            return value * float("nan") if batch_idx == 4 else value

    found = []

    class Watch(kit.SAM):
        @hookimpl
        def gw_report(self, report):
            found.extend(report.findings)

    kit.fit(Module(), Watch())
    [finding] = [f for f in found if f.plugin == "groundwire"]
    assert (finding.code, finding.value, finding.severity) == ("nonfinite_gradients", 1, "warn")


def test_a_nonfinite_replay_falls_back_to_the_first_gradient(kit):
    class Far(kit.SAM):
        @hookimpl
        def gw_gradient(self, step, run):
            with step.perturbed() as weights:
                weights["net.0.weight"].fill_(float("inf"))
                return step.replay()

    module, plain = kit.Net(), kit.Net()
    kit.fit(module, Far())
    kit.fit(plain)
    assert kit.difference(module.state_dict(), plain.state_dict()) == 0.0


def test_unknown_parameter_names_in_the_result_are_refused(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            return {"nonsense": torch.zeros(1)}

    with pytest.raises(PluginError, match=r"wrong .*nonsense"):
        kit.fit(kit.Net(), Wrong())


def test_two_gradient_owners_are_an_error_that_names_both(kit):
    class Other(kit.SAM):
        name = "other"

    with pytest.raises(PluginError, match="'other' and 'sam' both own the gradient"):
        kit.fit(kit.Net(), kit.SAM(), Other())


def test_a_fused_optimizer_under_a_scaler_sees_true_gradients(kit):
    """fp16 needs a GPU; the scaler is real, the autocast is bf16."""
    from lightning.pytorch.plugins import MixedPrecision

    def run(*callbacks, scaled):
        class Module(kit.Net):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

        plugin = MixedPrecision("bf16-mixed", "cpu")
        if scaled:
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        module = Module()
        kit.fit(module, *callbacks, plugins=[plugin])
        return module.state_dict()

    assert kit.difference(run(kit.SAM(), scaled=True), run(kit.SAM(), scaled=False)) < 1e-6
    assert kit.difference(run(kit.SAM(), scaled=True), run(scaled=True)) > 1e-5


def test_manual_optimization_needs_a_loss_function(kit):
    with pytest.raises(PluginError, match=r"sam: .*manual optimization.*loss_fn"):
        kit.fit(manual(kit)(), kit.SAM())


def test_manual_optimization_with_a_loss_function_equals_the_reference(kit):
    module = manual(kit)()
    kit.fit(module, kit.SAM(loss_fn=lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])))
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data())) == 0.0


def manual(kit):
    class Module(kit.Net):
        def setup(self, stage):
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    return Module


def test_two_optimizers_under_manual_optimization_replay_their_own_parameters(kit):
    names = []

    class Spy(kit.SAM):
        @hookimpl
        def gw_gradient(self, step, run):
            names.append(sorted(step.parameters))
            assert len(step.micro_batches) == 1
            return super().gw_gradient(step, run)

    class Module(kit.Net):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 3)]

    kit.fit(Module(), Spy(loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])))
    assert names == [["net.0.bias", "net.0.weight"], ["net.3.bias", "net.3.weight"]] * 5


def test_micro_batches_of_namedtuples_and_dataclasses_are_copied_shallowly():
    import dataclasses
    from typing import NamedTuple

    from groundwire.window import copy_containers

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


@pytest.mark.parametrize("every", [1, 2, 3])
def test_manual_optimization_replays_what_made_the_gradient(kit, every):
    """Batches whose gradient was thrown away are not in the window; accumulated ones are."""
    differences = []

    class Look(Plugin):
        loss_fn = staticmethod(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))

        @hookimpl
        def gw_gradient(self, step):
            found = step.replay()
            differences.append(max(float((found[n] - g).abs().max()) for n, g in step.grads.items()))

    class Discards(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if batch_idx % every == every - 1:
                optimizer.step()

    class Accumulates(Discards):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if batch_idx % every == every - 1:
                optimizer.step()
                optimizer.zero_grad()

    for module in (Discards(), Accumulates()):
        kit.fit(module, Look())
        assert "zero_grad" not in {**vars(module), **vars(module.optimizers()), **vars(module.optimizers().optimizer)}
    assert len(differences) == 2 * (5 // every)
    assert max(differences) < 1e-6


def test_optimizers_that_share_a_backward_both_get_their_window(kit):
    names = []

    class Spy(kit.SAM):
        loss_fn = staticmethod(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))

        def __init__(self):
            self.rho = 0.05

        @hookimpl
        def gw_gradient(self, step):
            names.append((len(step.parameters), len(step.micro_batches)))
            return step.replay()

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            first.step()
            second.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 3)]

    kit.fit(Module(), Spy())
    assert names == [(2, 1), (2, 1)] * 5


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (torch.zeros(2), r"'net.3.bias' must be a tensor of shape \(3,\), got shape \(2,\)"),
        (1.0, r"'net.3.bias' must be a tensor of shape \(3,\), got float"),
    ],
)
def test_wrong_gradients_name_owner_and_parameter(kit, result, text):
    class Wrong(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            return {"net.3.bias": result}

    with pytest.raises(PluginError, match=f"wrong: the gradient of {text}"):
        kit.fit(kit.Net(), Wrong())


def test_perturbing_an_unknown_parameter_names_the_known_ones(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            with step.perturbed(["nonsense"]):
                pass

    with pytest.raises(KeyError, match=r"nonsense.*net\.0\.weight"):
        kit.fit(kit.Net(), Wrong())


def test_a_loss_function_that_returns_nothing_is_refused(kit):
    with pytest.raises(PluginError, match="loss_fn must return the loss, one number with a gradient, got None"):
        kit.fit(manual(kit)(), kit.SAM(loss_fn=lambda module, batch: None))


def test_steps_that_lightning_does_not_see_are_told(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    with pytest.warns(UserWarning, match="'sam' had no effect"):
        kit.fit(Module(), kit.SAM(loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])))


def test_validation_does_not_ask_for_what_only_training_needs(kit):
    kit.trainer(kit.SAM()).validate(manual(kit)(), kit.loader(), verbose=False)


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
