"""Offsets by row, in other precisions and in copies; heads that a plugin was told."""

import warnings

import pytest
import torch
from torch import nn

import groundwire
from groundwire import Plugin, PluginError, Plugins, hookimpl
from groundwire.offset import add_offset, offset_of, offset_on, write_offset


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
    with offset_on(layer):
        write_offset(layer, rows)
        assert torch.allclose(layer(x), plain + rows.reshape(wide))
        assert torch.equal(offset_of(layer, plain), rows.reshape(wide))
        with pytest.raises(PluginError, match="6 rows in a batch whose 5 rows"):
            layer(torch.cat([x, x[:1]]))
        write_offset(layer, torch.ones(3))
        assert torch.allclose(layer(x), plain + 1)
    assert torch.equal(layer(x), plain)
    assert not {"gw_offset", "gw_offset_rows"} & vars(layer).keys()


def test_offsets_that_are_not_finite_or_do_not_fit_are_refused():
    layer = nn.Linear(2, 3)
    with offset_on(layer):
        for wrong in (torch.tensor([0.0, float("nan"), 0.0]), torch.tensor([0.0, float("inf"), 0.0])):
            with pytest.raises(PluginError, match="not finite"):
                write_offset(layer, wrong)
        for wrong in (torch.zeros(4), torch.zeros(2, 4), torch.zeros(2, 2, 3)):
            with pytest.raises(PluginError, match=r"give one of shape \(K,\) or \(B, K\)"):
                write_offset(layer, wrong)


def test_a_half_precision_output_is_promoted_so_that_the_offset_is_not_rounded():
    layer = nn.Linear(2, 3).bfloat16()
    x = torch.randn(4, 2).bfloat16()
    plain = layer(x)
    with offset_on(layer):
        write_offset(layer, torch.full((3,), 3.1416))
        assert torch.equal(layer(x), plain.float() + torch.tensor(3.1416))


class Told(Plugin):
    """Corrects the head that it was told."""

    def __init__(self, head, name="told"):
        self.head, self.name = head, name

    @hookimpl
    def gw_check(self, run):
        if run.ready and run.head is not None:
            run.offset(self.name, torch.ones(3))

    @hookimpl
    def gw_scores(self, scores, run):
        self.found = run.head.name
        self.gain = scores - run.raw_scores


def test_a_head_can_be_named_to_a_plugin(kit):
    told = Told("net.3")
    kit.trainer(told).validate(kit.Net(), kit.loader(), verbose=False)
    assert told.found == "net.3"
    assert torch.allclose(told.gain, torch.ones(()))
    kit.trainer(Plugins([told], head="net.3")).validate(kit.Net(), kit.loader(), verbose=False)
    with pytest.raises(PluginError, match=r"head='net.0' of Plugins and head='net.3' of told -> name one"):
        kit.trainer(Plugins([told], head="net.0")).validate(kit.Net(), kit.loader(), verbose=False)


def test_what_is_exported_during_a_run_has_no_offset_left(kit):
    class Exports(Told):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
            self.plain = groundwire.export(pl_module, plugins=[])

    told = Exports("net.3")
    module = kit.Net()
    kit.trainer(told).validate(module, kit.loader(), verbose=False)
    x = torch.randn(2, 8)
    module.eval()
    with torch.inference_mode():
        assert torch.equal(told.plain.eval()(x), module(x))
    assert add_offset not in told.plain.net[3]._forward_hooks.values()


def test_a_training_step_that_skips_its_forward_pass_has_no_scores(kit):
    class Skips(kit.Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    class Counts(Plugin):
        score_stages = ("train",)
        batches = 0

        @hookimpl
        def gw_scores(self, scores):
            self.batches += 1

    counts = Counts()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")  # Lightning says it once in a process
        kit.fit(Skips(), counts)
    assert counts.batches == 4


def test_a_pass_of_a_plugins_own_before_the_step_is_no_part_of_its_scores(kit):
    class Peeking(Told):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            with self.run.aside():
                pl_module(batch[0][:1])

        @hookimpl
        def gw_check(self, run):
            self.run = run

        @hookimpl
        def gw_scores(self, scores, fields):
            assert len(scores) == len(fields.inputs)

    kit.trainer(Peeking("net.3")).validate(kit.Net(), kit.loader(), verbose=False)


class ByBatch(Plugin):
    """Corrects each batch in its own way: all rows alike, or each for itself."""

    name, head = "by_batch", "net.3"

    def __init__(self, rows):
        self.rows, self.run = rows, None

    @hookimpl
    def gw_check(self, run):
        self.run = run

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        shape = (len(batch[0]), 3) if self.rows else (3,)
        self.run.offset(self.name, torch.randn(shape, generator=torch.Generator().manual_seed(batch_idx)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)


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
def test_each_batch_of_a_window_is_replayed_with_the_offset_that_corrected_it(kit, rows):
    replaying = Replaying()
    batches = [(torch.randn(size, 8), torch.randint(3, (size,))) for size in (4, 6, 6, 4)]
    plugins = Plugins([ByBatch(rows), replaying], report=False)
    kit.trainer(plugins, max_epochs=1, accumulate_grad_batches=2).fit(kit.Net(), iter(batches))
    assert replaying.gaps
    assert max(replaying.gaps) < 1e-6


def test_offsets_of_rows_are_gone_when_an_evaluation_is_over(kit):
    class Looking(ByBatch):
        @hookimpl
        def gw_findings(self, run):
            run.module(torch.zeros(1, 8))

    kit.trainer(Looking(rows=True)).validate(kit.Net(), kit.loader(), verbose=False)
