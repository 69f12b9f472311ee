"""CrAMOptimizer is a face of the optimizer it wraps: one set of groups, one state, one checkpoint."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from groundwire import PluginError, Plugins
from groundwire_cram import CrAM, CrAMOptimizer, Quantize


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3


def wrapped(net, sparsities=(0.5, 0.9), base=torch.optim.SGD, **options):
    return CrAMOptimizer(base(net.parameters(), lr=0.1, momentum=0.9), sparsities, **options)


def train(net, optimizer, steps, scheduler=None):
    def closure():
        loss = nn.functional.cross_entropy(net(X), Y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.zero_grad()
        closure()
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    return net.state_dict()


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_scheduler_drives_the_base_optimizer():
    net = network()
    optimizer = wrapped(net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(net, optimizer, 2, scheduler)
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state


def test_a_resumed_training_is_bit_identical_also_with_periodic_masks(tmp_path):
    for options in ({}, {"interval": 3}):
        whole_net = network()
        whole = train(whole_net, wrapped(whole_net, module=whole_net, **options), 7)
        net = network()
        optimizer = wrapped(net, module=net, **options)
        train(net, optimizer, 4)
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
        half = torch.load(tmp_path / "half.pt", weights_only=True)
        other = network()
        other.load_state_dict(half["net"])
        resumed = wrapped(other, module=other, **options)
        resumed.load_state_dict(half["optimizer"])
        scheduler = torch.optim.lr_scheduler.ConstantLR(resumed, factor=1.0)
        assert same(whole, train(other, resumed, 3, scheduler))


def test_its_checkpoint_has_the_base_optimizers_tensors_only_and_loads_into_either():
    net = network()
    optimizer = wrapped(net)
    train(net, optimizer, 2)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "cram"}
    assert not any(isinstance(v, torch.Tensor) for v in state["cram"].values())
    plain = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(state)
    assert len(plain.state) == len(optimizer.state) == 6
    fresh = wrapped(network())
    fresh.load_state_dict(plain.state_dict())
    assert fresh.steps == 0
    assert len(fresh.state) == 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_whole(copied):
    net = network()
    optimizer = wrapped(net)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(net, optimizer, 1)
    twin = copied(optimizer)
    assert twin.steps == 1
    assert twin.param_groups is twin.base_optimizer.param_groups
    assert twin.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]


def test_statistics_of_the_module_are_those_of_the_first_passes_only():
    net, plain = network(), network()
    train(net, wrapped(net, module=net), 3)
    assert int(net[1].num_batches_tracked) == 3
    train(plain, wrapped(plain), 3)
    assert int(plain[1].num_batches_tracked) == 6


def test_groups_can_be_added_and_names_come_from_the_module_or_the_optimizer():
    net = network()
    optimizer = CrAMOptimizer(torch.optim.SGD(net[0].named_parameters(prefix="0"), lr=0.1), 0.5)
    optimizer.add_param_group({"params": list(net[3].named_parameters(prefix="3"))})
    assert list(optimizer._named()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert len(optimizer.base_optimizer.param_groups) == 2


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted():
    net = network()
    before = copy.deepcopy(net.state_dict())
    optimizer = wrapped(net)
    net[3].bias.grad = torch.full((3,), float("nan"))
    net[0].weight.grad = torch.ones(16, 8)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: None)
    assert optimizer.skipped_steps == 1
    assert same(before, net.state_dict())


def test_a_second_gradient_that_is_not_finite_leaves_the_first():
    net, plain = network(), network()
    optimizer = wrapped(net)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for module in (net, plain):
        nn.functional.cross_entropy(module(X), Y).backward()
    optimizer.step(lambda: (net(X).sum() * float("nan")).backward())
    sgd.step()
    assert same(dict(net.named_parameters()), dict(plain.named_parameters()))
    assert optimizer.minimizer.overflows == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_closure_leaves_weights_and_gradients_of_before(error):
    net = network()
    optimizer = wrapped(net, module=net)
    nn.functional.cross_entropy(net(X), Y).backward()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]

    def fails():
        assert (net[0].weight == 0).any()
        raise error

    with pytest.raises(error):
        optimizer.step(fails)
    assert same(before, net.state_dict())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))


def test_what_it_needs_is_said():
    net = network()
    with pytest.raises(TypeError, match="base_optimizer must be an optimizer"):
        CrAMOptimizer(net.parameters())
    with pytest.raises(ValueError, match="first_pass"):
        wrapped(net, first_pass="none")
    with pytest.raises(TypeError, match="second gradient"):
        wrapped(net).step()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        wrapped(net).step(lambda: None)
    with pytest.raises(ValueError, match="nothing to prune"):
        CrAMOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))


def in_lightning(kit, wrap):
    class Module(kit.Net):
        def configure_optimizers(self):
            optimizer = wrap(self)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def test_in_a_trainer_it_equals_the_callback_with_schedule_accumulation_and_clipping(kit):
    def cram(module):
        return CrAMOptimizer(kit.sgd(module.parameters()), (0.5, 0.9), module=module)

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 2}
    ours, theirs = in_lightning(kit, cram), in_lightning(kit, lambda module: kit.sgd(module.parameters()))
    kit.fit(ours, Plugins(), **options)
    kit.fit(theirs, CrAM((0.5, 0.9)), **options)
    assert kit.difference(ours.state_dict(), theirs.state_dict()) == 0.0


def test_in_a_trainer_a_resume_continues_bit_for_bit(kit):
    def cram(module):
        return CrAMOptimizer(kit.sgd(module.parameters()), (0.5, 0.9), module=module)

    whole, half, rest = (in_lightning(kit, cram) for _ in range(3))
    kit.fit(whole, Plugins(), max_epochs=2)
    kit.fit(half, Plugins(), max_epochs=1).save_checkpoint(kit.path / "half.ckpt")
    kit.fit(rest, Plugins(), max_epochs=2, ckpt_path=kit.path / "half.ckpt")
    assert kit.difference(whole.state_dict(), rest.state_dict()) == 0.0


def test_a_trainer_without_groundwires_bundle_says_so(kit):
    module = in_lightning(kit, lambda m: CrAMOptimizer(kit.sgd(m.parameters()), 0.5))
    with pytest.raises(PluginError, match=r"groundwire\.Plugins\(\)"):
        kit.fit(module)


def test_any_operator_and_any_base_optimizer_train():
    net = network()
    optimizer = CrAMOptimizer(torch.optim.AdamW(net.parameters(), lr=0.01), compress=Quantize(4), module=net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer, 30)
    assert nn.functional.cross_entropy(net(X), Y).item() < 0.9
    assert "int4" in repr(optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_the_trainers_steps_are_those_without_one(kit, fused):
    """fp16 needs a GPU; the scaler is real, the autocast is bf16."""
    from lightning.pytorch.plugins import MixedPrecision

    def run(scaled):
        module = in_lightning(
            kit, lambda m: CrAMOptimizer(torch.optim.SGD(m.parameters(), lr=0.1, fused=fused), 0.5, module=m)
        )
        plugin = MixedPrecision("bf16-mixed", "cpu")
        if scaled:
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        kit.fit(module, Plugins(), plugins=[plugin])
        return module.state_dict()

    assert kit.difference(run(True), run(False)) < 1e-6
