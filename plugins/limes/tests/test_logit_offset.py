"""The hook on the head: what it adds, what it leaves, and where it would be bypassed."""

import copy
import io
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from limes_digit_stream import HOUR, Digits, Listed, Spy, across_hours, fit, module_of, offset_on
from torch import nn

import groundwire
from groundwire import Plugin, PluginError, Plugins, hookimpl
from groundwire.modules import shift_hooks
from groundwire_limes import LIMES
from groundwire_limes.logit_offset import LogitOffset


def with_offset(layer):
    hook = LogitOffset(torch.zeros(3))
    return hook, layer.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("layer", "shape", "wide"),
    [
        (nn.Linear(4, 3), (5, 4), (5, 3)),
        (nn.Linear(4, 3), (5, 7, 4), (5, 1, 3)),
        (nn.Conv2d(4, 3, 1), (5, 4, 2, 2), (5, 3, 1, 1)),
    ],
)
def test_each_row_may_have_an_offset_of_its_own(layer, shape, wide):
    x, rows = torch.randn(shape), torch.randn(5, 3)
    plain = layer(x)
    hook, handle = with_offset(layer)
    hook.write(layer, rows)
    assert torch.equal(layer(x), plain + rows.reshape(wide))
    with pytest.raises(PluginError, match="6 rows in a batch whose 5 rows"):
        layer(torch.cat([x, x[:1]]))
    hook.write(layer, torch.ones(3))
    assert torch.equal(layer(x), plain + 1)
    handle.remove()
    assert torch.equal(layer(x), plain)


def test_offsets_that_are_not_finite_or_do_not_fit_are_refused():
    layer = nn.Linear(2, 3)
    hook, _ = with_offset(layer)
    for wrong in (torch.tensor([0.0, float("nan"), 0.0]), torch.tensor([0.0, float("inf"), 0.0])):
        with pytest.raises(PluginError, match="not finite"):
            hook.write(layer, wrong)
    for wrong in (torch.zeros(4), torch.zeros(2, 4), torch.zeros(2, 2, 3)):
        with pytest.raises(PluginError, match=r"give one of shape \(K,\) or \(B, K\)"):
            hook.write(layer, wrong)


def test_a_half_precision_output_is_promoted_so_that_the_offset_is_not_rounded():
    layer = nn.Linear(2, 3).bfloat16()
    x = torch.randn(4, 2).bfloat16()
    plain = layer(x)
    hook, _ = with_offset(layer)
    hook.write(layer, torch.full((3,), 3.1416))
    assert torch.equal(layer(x), plain.float() + torch.tensor(3.1416))


def test_while_it_is_off_nothing_is_added_whatever_is_written():
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    plain = layer(x)
    hook, _ = with_offset(layer)
    hook.write(layer, torch.randn(4, 3))
    before = layer(x)
    with hook.off():
        assert torch.equal(layer(x), plain)
        with hook.off():
            hook.write(layer, torch.ones(3))
        hook.write(layer, torch.ones(4, 3))
        assert torch.equal(layer(x[:1]), plain[:1])
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_or_a_pickle_of_a_corrected_layer_adds_nothing_and_may_be_compiled(twin):
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    plain = layer(x)
    hook, _ = with_offset(layer)
    hook.write(layer, torch.randn(4, 3))
    assert torch.equal(twin(layer)(x), plain)
    assert twin(layer)(x[:1]).shape == (1, 3)
    torch.compiler.reset()
    assert torch.allclose(torch.compile(twin(layer), backend="eager")(x), plain)
    assert len(shift_hooks(twin(layer))) == 1


def test_a_run_leaves_no_key_no_hook_and_no_attribute(kit):
    module = Digits()
    keys, attributes = list(module.state_dict()), set(vars(module.net[2]))
    kept = []

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert len(shift_hooks(pl_module.net[2])) == 1
            kept.append(list(pl_module.state_dict()))
            torch.save(pl_module.net, io.BytesIO())

    kit.trainer(LIMES(), Saves()).fit(module, datamodule=module_of(2))
    assert all(found == keys for found in kept)
    assert set(vars(module.net[2])) == attributes
    assert not module.net[2]._forward_hooks


def test_the_hook_is_gone_when_a_step_fails(kit):
    class Breaks(Digits):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    module = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        kit.trainer(LIMES()).fit(module, datamodule=module_of(2))
    assert not module.net[2]._forward_hooks


@pytest.mark.parametrize("rows", [False, True])
def test_offsets_of_rows_are_gone_when_an_evaluation_is_over(kit, fitted, rows):
    """Whoever runs the module then has another number of rows."""

    class Looking(Plugin):
        looked = 0

        @hookimpl
        def gw_findings(self, run):
            run.module(torch.zeros(1, 64))
            self.looked += 1

    batches = (across_hours(module_of()) if rows else module_of()).train_dataloader()
    looking = Looking()
    plugins = Plugins([looking, copy.deepcopy(fitted.limes)], report=False)
    kit.trainer(plugins).validate(Digits(), Listed(list(batches)), verbose=False)
    assert looking.looked == 1


class Replaying(Plugin):
    """Takes the gradient of the same weights once more."""

    name = "replaying"

    def __init__(self):
        self.gaps = []

    @hookimpl
    def gw_gradient(self, step):
        again = step.replay()
        self.gaps += [float((again[name] - grad).abs().max()) for name, grad in step.grads.items()]
        return again


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("training_prior", ["running", "forecast"])
def test_each_batch_of_a_window_is_replayed_with_the_offset_that_corrected_it(kit, rows, training_prior):
    class Seen(Digits):
        def training_step(self, batch, batch_idx):
            seen.append((batch_idx, offset_on(self.net[2])))
            return super().training_step(batch, batch_idx)

    seen, replaying = [], Replaying()
    limes = LIMES(training_prior=training_prior, season="4h")
    plugins = Plugins([limes, replaying], report=False)
    datamodule = across_hours(module_of()) if rows else module_of()
    kit.trainer(plugins, accumulate_grad_batches=3).fit(Seen(), datamodule=datamodule)
    batches = len(datamodule.batches())
    assert len(seen) == 2 * batches
    assert max(replaying.gaps) < 1e-6
    by_batch = [[offset for index, offset in seen if index == batch] for batch in range(batches)]
    assert all(torch.equal(first, again) for first, again in by_batch)
    assert len({tuple(first.flatten().tolist()) for first, _ in by_batch}) > 10
    counts = torch.tensor(limes.extrapolator.state_dict()["counts"])
    assert counts.sum() == sum(map(len, datamodule.batches()))  # a replay counts nothing


def test_an_average_of_the_weights_is_that_of_the_weights_that_limes_alone_trains(kit):
    class Weights(pl.Callback):
        """Keeps the trained weights after each step."""

        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.steps.append([p.detach().clone() for p in pl_module.parameters()])

    alone, spy = Weights(), Spy()
    kit.trainer(LIMES(), alone, spy).fit(Digits(), datamodule=module_of())
    expected = alone.steps[0]
    for step in alone.steps[1:]:
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, step, strict=True)]
    beside, seen, module = Weights(), Spy(), Digits()
    val = module_of(2).train_dataloader()
    averaging = EMAWeightAveraging(decay=0.9)
    trainer = kit.trainer(LIMES(), beside, seen, averaging, val_check_interval=5)
    trainer.fit(module, module_of().train_dataloader(), val)
    assert all(torch.equal(a, b) for a, b in zip(spy.offsets, seen.offsets, strict=True))
    for one, other in zip(alone.steps, beside.steps, strict=True):
        assert all(map(torch.equal, one, other))
    found = list(module.parameters())
    assert list(module.state_dict()) == list(Digits().state_dict())
    assert all(torch.allclose(e, f, atol=1e-6) for e, f in zip(expected, found, strict=True))


@pytest.mark.filterwarnings("ignore:.*swa_lr|.*SWA")
def test_stochastic_weight_averaging_trains_beside_it(kit):
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    module, limes = Digits(), LIMES(on_backward="replay")
    kit.trainer(limes, averaging, max_epochs=3).fit(module, datamodule=module_of())
    assert list(module.state_dict()) == list(Digits().state_dict())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    plain = kit.trainer().predict(module, module_of().train_dataloader())
    corrected = kit.trainer(limes).predict(module, module_of().train_dataloader())
    assert not torch.allclose(plain[-1], corrected[-1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("called_before", [False, True])
def test_an_offset_that_a_compiled_model_would_bypass_is_refused_in_prediction_too(kit, fitted, called_before):
    torch.compiler.reset()
    module = Digits()
    module.load_state_dict(fitted.module.state_dict())
    module.net = torch.compile(module.net, backend="eager")
    x = torch.zeros(20, 64)
    for mode in [torch.no_grad, torch.inference_mode] * called_before:
        with mode():
            module.eval()(x)
    limes = LIMES(head="net._orig_mod.2")
    limes.load_state_dict(torch.load(fitted.checkpoint, weights_only=True)["callbacks"][limes.state_key])
    batches = Listed(list(module_of().train_dataloader()))
    if called_before:
        with pytest.raises(PluginError, match="'limes' cannot correct the scores"):
            kit.trainer(limes).predict(module, batches)
    else:
        found = kit.trainer(limes).predict(module, batches)
        expected = kit.trainer(copy.deepcopy(fitted.limes)).predict(fitted.module, batches)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_of_several_steps_compile_a_model_once_more_and_no_oftener(kit):
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    module, counter = Digits(), CompileCounter()
    module.net = torch.compile(module.net, backend=counter, dynamic=False)
    batches = list(across_hours(module_of()).train_dataloader())
    mixed = [len({int(t) // HOUR for t in batch[2]["timestamp"]}) > 1 for batch in batches]
    shapes = {(len(batch[0]), several) for batch, several in zip(batches, mixed, strict=True)}
    limes = LIMES(head="net._orig_mod.2", training_prior="forecast", method="nearest")
    kit.trainer(limes).fit(module, Listed(batches))
    _, eager, _ = fit(kit, LIMES(training_prior="forecast", method="nearest"), across_hours(module_of()))
    weights = {k.replace("_orig_mod.", ""): v for k, v in module.state_dict().items()}
    assert kit.difference(weights, eager.state_dict()) < 1e-5
    assert any(mixed)
    assert counter.frame_count == len(shapes) + 1  # and once for the evaluation mode of the first look


def test_a_checkpoint_remembers_that_the_scores_were_changed(fitted):
    known = torch.load(fitted.checkpoint, weights_only=True)["groundwire"]["plugins"]
    assert [(plugin["name"], plugin["changes"]) for plugin in known] == [("limes", "scores")]


def test_a_module_copied_in_a_run_is_the_users_own(kit):
    copies = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 20:
                copies.append((copy.deepcopy(pl_module), groundwire.export(pl_module, plugins=[])))

    kit.trainer(LIMES(), Copies()).fit(Digits(), datamodule=across_hours(module_of()))
    [(twin, plain)] = copies
    x = torch.randn(1, 64)
    assert torch.equal(twin(x), plain(x))
    assert not shift_hooks(plain.net[2])
