"""Scores are those of the forward pass that happens anyway."""

import lightning.pytorch as pl
import pytest
import torch
from core_model_plugins import Observer
from torch.utils.data import DataLoader

from groundwire import Plugin, PluginError, hookimpl
from groundwire.services.scores.capture import combine


def test_scores_are_those_of_the_forward_that_happens_anyway(kit):
    observer, module = Observer(features=True), kit.Net()
    trainer = kit.trainer(observer)
    trainer.validate(module, kit.loader(), verbose=False)
    module.eval()
    x, y = kit.data().tensors
    # In batches as they came: a matrix product may round other numbers of rows differently.
    batches = x.split(8)
    assert torch.equal(torch.cat([s[2] for s in observer.seen]), torch.cat([module(rows) for rows in batches]).detach())
    assert torch.equal(torch.cat([s[3] for s in observer.seen]), y)
    features = torch.cat([module.net[:3](rows) for rows in batches]).detach()
    assert torch.equal(torch.cat([s[4] for s in observer.seen]), features)
    assert {s[6] for s in observer.seen} == {"net.3"}
    assert all(not s[2].requires_grad for s in observer.seen)


def test_scores_of_the_stages_asked_for_and_never_of_the_sanity_check(kit):
    every, default = Observer(("train", "validate", "test", "predict")), Observer()
    default.name = "default"
    module = kit.Net()
    trainer = kit.fit(module, every, default, val=kit.loader(), num_sanity_val_steps=2)
    trainer.test(module, kit.loader(), verbose=False)
    trainer.predict(module, kit.loader())
    assert [s[0] for s in every.seen] == ["train"] * 5 + ["validate"] * 5 + ["test"] * 5 + ["predict"] * 5
    assert [s[0] for s in default.seen] == ["validate"] * 5 + ["test"] * 5


def test_scores_do_not_change_training(kit):
    plain, watched = kit.Net(), kit.Net()
    kit.fit(plain, val=kit.loader())
    kit.fit(watched, Observer(("train", "validate")), val=kit.loader())
    assert kit.difference(plain.state_dict(), watched.state_dict()) == 0.0


def test_bf16_scores_come_as_float32(kit):
    observer = Observer()
    kit.trainer(observer, precision="bf16-mixed").validate(kit.Net(), kit.loader(), verbose=False)
    assert observer.seen[0][2].dtype == torch.float32


@pytest.mark.parametrize(
    ("counts", "rows", "expected"), [([4], 4, 4), ([4, 4], 4, 4), ([4, 4], 8, 8), ([2, 2], None, 2)]
)
def test_several_forward_passes_a_step(counts, rows, expected):
    assert len(combine([torch.zeros(n, 3) for n in counts], rows)) == expected


def test_the_last_of_several_full_forward_passes_counts(kit):
    assert torch.equal(combine([torch.zeros(4, 3), torch.ones(4, 3)], 4), torch.ones(4, 3))

    class Module(kit.Net):
        def validation_step(self, batch, batch_idx):
            self(2 * batch[0])
            self.own.append(self(batch[0]))

        def on_train_batch_start(self, batch, batch_idx):
            self.own = []

        def training_step(self, batch, batch_idx):
            self(-batch[0])
            self.own = [self(batch[0])]
            return self.own[0].square().mean()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert torch.equal(observer.seen[-1][2], self.own[0].detach())

    observer, module = Observer(("train", "validate")), Module()
    module.own = []
    kit.trainer(observer).validate(module, kit.loader(), verbose=False)
    assert torch.equal(torch.cat([s[2] for s in observer.seen]), torch.cat(module.own))
    kit.fit(module.train(), observer)


def test_nothing_is_captured_between_the_batches_that_somebody_wants(kit):
    observer, module = Observer(), kit.Net()

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            first, *_, last = module.net[3]._forward_hooks.values()
            assert not first.outputs
            assert not last.outputs

    kit.fit(module, observer, Look(), val=kit.loader(), num_sanity_val_steps=2, max_epochs=2)


def test_rows_that_fit_no_rule_are_refused():
    with pytest.raises(PluginError, match=r"\[3, 4\] rows.*8 rows"):
        combine([torch.zeros(3, 1), torch.zeros(4, 1)], 8)


def test_training_scores_are_not_those_of_a_replay(kit):
    class Zeros(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            with step.perturbed() as weights:
                for weight in weights.values():
                    weight.zero_()
                return step.replay()

    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.last = self(batch[0]).detach()
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert torch.equal(observer.seen[-1][2], self.last)

    observer = Observer(("train",))
    rows = DataLoader(kit.data(36), 8)
    kit.fit(Module(), observer, Zeros(), loader=rows, accumulate_grad_batches=2)
    assert [len(s[2]) for s in observer.seen] == [8, 8, 8, 8, 4]


def test_stages_that_do_not_exist_are_refused(kit):
    with pytest.raises(PluginError, match=r"observer: score_stages has \['val'\] -> use some of train, validate"):
        kit.fit(kit.Net(), Observer(("val",)))
