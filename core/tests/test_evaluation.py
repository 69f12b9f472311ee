"""Evaluating variants of the model within a run that does not notice."""

import contextlib

import pytest
import torch
import torchmetrics
from torch.utils.data import DataLoader, IterableDataset

from groundwire import Fields, Plugin, PluginError, Variant, hookimpl


class Scaled(Plugin):
    """Offers the model with weights times two, asks for it, and remembers what it got."""

    name = "scaled"

    def __init__(self):
        self.results, self.scores = [], []

    @hookimpl
    def gw_variants(self, module):
        @contextlib.contextmanager
        def doubled():
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(2)
            try:
                yield
            finally:
                with torch.no_grad():
                    for p in module.parameters():
                        p.div_(2)

        return [Variant("doubled", doubled)]

    @hookimpl
    def gw_findings(self, run):
        if run.stage in ("validate", "test"):
            self.results += [run.evaluate(v, run.stage) for v in [None, *run.variants()]]

    @hookimpl
    def gw_scores(self, scores, variant):
        self.scores.append((variant, scores))


def metrics_module(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.acc = torchmetrics.Accuracy("multiclass", num_classes=3)
            self.order, self.outs = [], []

        def on_train_batch_start(self, batch, batch_idx):
            self.order.append(batch[0].sum().item())

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.acc(self(batch[0]), batch[1])
            self.outs.append(1)
            self.log("acc", self.acc)

    return Module


def test_a_run_does_not_notice_that_variants_are_evaluated(kit):
    results = []
    for plugins in ([], [Scaled()]):
        torch.manual_seed(0)
        module = metrics_module(kit)()
        loaders = DataLoader(kit.data(), 8, shuffle=True), DataLoader(kit.data(20), 8)
        trainer = kit.fit(module, *plugins, loader=loaders[0], val=loaders[1], max_epochs=2, limit_val_batches=2)
        results.append((module, trainer.callback_metrics))
    (plain, logged), (ours, logged_too) = results
    assert plain.order == ours.order
    assert plain.outs == ours.outs
    assert logged == logged_too
    assert kit.difference(plain.state_dict(), ours.state_dict()) == 0.0


def test_evaluations_equal_a_validation_of_the_edited_model(kit):
    plugin, module = Scaled(), metrics_module(kit)()
    trainer = kit.trainer(plugin)
    [own] = trainer.validate(module, kit.loader(), verbose=False)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    [doubled] = kit.trainer().validate(module, kit.loader(), verbose=False)
    for found, expected in zip(plugin.results, (own, doubled), strict=True):
        assert found.batches == 5
        assert dict(found.metrics) == pytest.approx(expected)
    assert [name for name, _ in plugin.scores] == [None] * 5 + ["doubled"] * 5


def test_several_loaders_dicts_and_limits(kit):
    plugin = Scaled()

    class Module(kit.Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    trainer = kit.trainer(plugin, limit_val_batches=2)
    trainer.validate(Module(), [kit.loader(), kit.loader()], verbose=False)
    assert [r.batches for r in plugin.results] == [4, 4]


def test_a_one_shot_loader_is_refused(kit):
    class Module(kit.Net):
        def val_dataloader(self):
            return iter(list(kit.loader()))

    with pytest.raises(PluginError, match="can be read only once"):
        kit.trainer(Scaled()).validate(Module(), verbose=False)


def test_evaluate_outside_an_evaluation_is_refused(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_gradient(self, step, run):
            run.evaluate()

    with pytest.raises(PluginError, match="while 'train' runs"):
        kit.fit(kit.Net(), Wrong())


@pytest.mark.parametrize("several", [False, True])
def test_names_and_values_are_lightnings_own(kit, several):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.seen = []

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])
            self.seen.append(float(batch_idx))
            self.log("sum", float(batch_idx), reduce_fx="sum")
            self.log("max", float(batch_idx) + dataloader_idx, reduce_fx="max")
            self.log("mean", batch[0].mean())

        def on_validation_epoch_end(self):
            self.log("at_end", sum(self.seen))
            self.seen.clear()

    plugin = Scaled()
    loaders = [kit.loader(), DataLoader(kit.data(20), 8)] if several else kit.loader()
    trainer = kit.trainer(plugin)
    trainer.validate(Module(), loaders, verbose=False)
    expected = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert dict(plugin.results[0].metrics) == pytest.approx(expected)


def test_combined_loaders_are_combined_as_the_loop_does(kit):
    from lightning.pytorch.utilities import CombinedLoader

    class Module(kit.Net):
        @hookimpl
        def gw_fields(self, batch):
            return Fields(*batch["a"])

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch["a"], batch_idx)
            assert set(batch) == {"a", "b"}

    plugin = Scaled()
    loader = CombinedLoader({"a": kit.loader(), "b": kit.loader()}, "min_size")
    kit.trainer(plugin).validate(Module(), loader, verbose=False)
    assert [r.batches for r in plugin.results] == [5, 5]


def test_a_stream_that_is_used_up_is_refused(kit):
    class Once(IterableDataset):
        rows = iter(kit.data())

        def __iter__(self):
            return self.rows

    with pytest.raises(PluginError, match="can be read only once"):
        kit.trainer(Scaled()).validate(kit.Net(), DataLoader(Once(), 8), verbose=False)


def test_something_else_than_a_variant_is_refused(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_findings(self, run):
            run.evaluate("0.5")

    with pytest.raises(PluginError, match=r"takes a Variant or None, got '0\.5'"):
        kit.trainer(Wrong()).validate(kit.Net(), kit.loader(), verbose=False)


def test_the_modules_own_hooks_around_a_batch_run_in_an_evaluation_too(kit):
    class Collects(kit.Net):
        def on_validation_epoch_start(self):
            self.seen = []

        def on_validation_batch_start(self, batch, batch_idx):
            self.factor = batch_idx

        def validation_step(self, batch, batch_idx):
            self(batch[0])
            return self.factor

        def on_validation_batch_end(self, outputs, batch, batch_idx):
            self.seen.append(outputs)

        def on_validation_epoch_end(self):
            self.log("collected", float(sum(self.seen)))

    plugin, module = Scaled(), Collects()
    [own] = kit.trainer(plugin).validate(module, kit.loader(), verbose=False)
    assert [dict(found.metrics) for found in plugin.results] == [own, own]
    assert module.seen == [0, 1, 2, 3, 4]
