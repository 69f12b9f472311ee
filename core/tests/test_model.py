"""What plugins see and change of the model: structure, head, scores, offset."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from groundwire import Plugin, PluginError, Plugins, hookimpl
from groundwire.head import find_head
from groundwire.scores import combine


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


class Surgery(Plugin):
    """Halves every Linear weight through a parametrization."""

    name = "surgery"

    @hookimpl
    def gw_transform_model(self, module):
        for child in list(module.modules()):
            if isinstance(child, nn.Linear) and not parametrize.is_parametrized(child):
                parametrize.register_parametrization(child, "weight", Half())

    @hookimpl
    def gw_export(self, module):
        for child in list(module.modules()):
            if parametrize.is_parametrized(child):
                parametrize.remove_parametrizations(child, "weight")


class Observer(Plugin):
    name = "observer"
    score_stages = ("validate", "test")

    def __init__(self, stages=None, features=False):
        self.score_stages = stages or self.score_stages
        self.needs_features = features
        self.seen = []

    @hookimpl
    def gw_scores(self, scores, fields, stage, variant, run):
        self.seen.append((stage, variant, scores, fields.targets, run.features, run.raw_scores, run.head.name))


def late(kit, where):
    class Module(kit.Net):
        def __init__(self):
            pl.LightningModule.__init__(self)
            self.net = None

        def build(self, *args, **kwargs):
            if self.net is None:
                self.net = kit.network()

    setattr(Module, where, Module.build)
    return Module


@pytest.mark.parametrize("where", ["__init__", "setup", "configure_model"])
def test_transformed_wherever_the_model_is_built(kit, where):
    module = kit.Net() if where == "__init__" else late(kit, where)()
    trainer = kit.fit(module, Surgery())
    assert "net.0.parametrizations.weight.original" in module.state_dict()
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.parameters()}
    assert "configure_model" not in vars(module)
    copy.deepcopy(module)


def test_the_transform_stays_and_is_made_once(kit):
    module = kit.Net()
    trainer = kit.fit(module, Surgery())
    trainer.validate(module, kit.loader(), verbose=False)
    kit.fit(module, Surgery())
    assert len(module.net[0].parametrizations.weight) == 1


def test_resume_restores_transformed_weights(kit):
    one = kit.fit(kit.Net(), Surgery(), kit.SAM(), max_epochs=2)
    half = kit.fit(kit.Net(), Surgery(), kit.SAM(), max_epochs=1)
    path = kit.path / "half.ckpt"
    half.save_checkpoint(path, weights_only=False)
    rest = kit.fit(kit.Net(), Surgery(), kit.SAM(), max_epochs=2, ckpt_path=path)
    assert kit.difference(one.lightning_module.state_dict(), rest.lightning_module.state_dict()) == 0.0


def test_averaging_listed_before_the_plugins_is_refused_and_after_works(kit):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.raises(PluginError, match=r"EMAWeightAveraging is listed before .* surgery .*list it after"):
        kit.fit(kit.Net(), EMAWeightAveraging(), Surgery())
    kit.fit(kit.Net(), Surgery(), EMAWeightAveraging())


def test_a_transform_in_child_processes_only_is_refused(kit):
    with pytest.raises(Exception, match=r"surgery: the model would change in the child processes"):
        kit.fit(kit.Net(), Surgery(), strategy="ddp_fork", devices=1, accelerator="cpu")


HEADS = {
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "2"),
    "one_logit_squeezed": (lambda: Lambda(nn.Linear(4, 1), lambda f, x: f(x).squeeze(1)), "f"),
    "log_softmax_after": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), "0"),
    "registered_first": (lambda: First(), "classifier"),
    "frozen_head": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3).requires_grad_(False)), "1"),
    "auxiliary_in_training_only": (lambda: Auxiliary(), "main"),
    "attention_before_it": (lambda: Attention(), "fc"),
    "output_in_a_dict": (lambda: Lambda(nn.Linear(4, 3), lambda f, x: {"logits": f(x)}), "f"),
}


class Lambda(nn.Module):
    def __init__(self, f, call):
        super().__init__()
        self.f, self.call = f, call

    def forward(self, x):
        return self.call(self.f, x)


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier, self.body, self.pooler = nn.Linear(8, 3), nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.classifier(self.pooler(self.body(x)))


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return (self.main(x), self.aux(x)) if self.training else self.main(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.att = nn.Linear(4, 3), nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        return self.fc(self.att(x[:, None], x[:, None], x[:, None])[0].squeeze(1))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.w)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.h1, self.h2 = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.h1(x), self.h2(x)


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("inference", [False, True])
def test_the_head_is_found(case, inference):
    make, name = HEADS[case]
    net = make().train()
    flags = [p.requires_grad for p in net.parameters()]
    with torch.inference_mode(inference):
        assert find_head(net, torch.randn(5, 4)).name == name
    assert net.training
    assert flags == [p.requires_grad for p in net.parameters()]
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("net", "text"),
    [(Functional(), "body and from a parameter of no layer"), (TwoHeads(), "h1, h2"), (nn.ReLU(), "no Linear")],
)
def test_an_ambiguous_head_is_refused_with_the_candidates(net, text):
    with pytest.raises(PluginError, match=rf"{text}.*Plugins\(head="):
        find_head(net, torch.randn(2, 4))


def test_scores_are_those_of_the_forward_that_happens_anyway(kit):
    observer, module = Observer(features=True), kit.Net()
    trainer = kit.trainer(observer)
    trainer.validate(module, kit.loader(), verbose=False)
    module.eval()
    x, y = kit.data().tensors
    assert torch.equal(torch.cat([s[2] for s in observer.seen]), module(x).detach())
    assert torch.equal(torch.cat([s[3] for s in observer.seen]), y)
    assert torch.equal(torch.cat([s[4] for s in observer.seen]), module.net[:3](x).detach())
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


def test_the_head_can_be_named_and_a_wrong_name_lists_the_candidates(kit):
    observer = Observer()
    kit.trainer(Plugins([observer], head="net.0")).validate(kit.Net(), kit.loader(), verbose=False)
    assert observer.seen[0][2].shape == (8, 16)
    with pytest.raises(PluginError, match=r"head='net.9'.*\['net.0', 'net.3'\]"):
        kit.trainer(Plugins([Observer()], head="net.9")).validate(kit.Net(), kit.loader(), verbose=False)


def test_a_module_without_forward_needs_a_name_and_says_so(kit):
    class Module(kit.Net):
        forward = pl.LightningModule.forward

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    with pytest.raises(PluginError, match=r"its forward\(inputs\) failed"):
        kit.trainer(Observer()).validate(Module(), kit.loader(), verbose=False)
    kit.trainer(Plugins([Observer()], head="net.3")).validate(Module(), kit.loader(), verbose=False)


@pytest.mark.parametrize(
    ("counts", "rows", "expected"), [([4], 4, 4), ([4, 4], 4, 4), ([4, 4], 8, 8), ([2, 2], None, 2)]
)
def test_several_forward_passes_a_step(counts, rows, expected):
    assert len(combine([torch.zeros(n, 3) for n in counts], rows)) == expected


def test_rows_that_fit_no_rule_are_refused():
    with pytest.raises(PluginError, match=r"\[3, 4\] rows.*8 rows"):
        combine([torch.zeros(3, 1), torch.zeros(4, 1)], 8)


class Offset(Plugin):
    def __init__(self, value=1.0, name="offset"):
        self.value, self.name = value, name

    def on_train_start(self, trainer, pl_module):
        pass

    @hookimpl
    def gw_check(self, run):
        if run.ready:
            run.offset(self.name, torch.full((3,), self.value))

    @hookimpl
    def gw_scores(self, scores, run):
        self.scores, self.raw = scores, run.raw_scores


def test_an_offset_moves_the_scores_and_leaves_no_key(kit):
    module = kit.Net()
    keys = list(module.state_dict())
    plugin = Offset()
    trainer = kit.trainer(Plugins([plugin], head="net.3"))
    [shifted] = trainer.predict(module, DataLoader(kit.data(), 40))
    [plain] = kit.trainer().predict(module, DataLoader(kit.data(), 40))
    assert torch.equal(shifted, plain + 1)
    assert list(module.state_dict()) == keys
    assert not hasattr(module.net[3], "gw_offset")
    trainer.validate(module, kit.loader(), verbose=False)
    assert torch.equal(plugin.scores, plugin.raw + 1)


def test_copies_and_pickles_of_a_module_in_a_run_take_nothing_along(kit):
    copies = []

    class Copies(Observer):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            copies.append(copy.deepcopy(pl_module))
            pickle.dumps(pl_module.net)

    plugins = Plugins([Copies(), Offset()], head="net.3")
    kit.trainer(plugins, limit_val_batches=1).validate(kit.Net(), kit.loader(), verbose=False)
    [twin] = copies
    assert twin._trainer is None
    with torch.inference_mode():
        assert twin(torch.zeros(1, 8)).shape == (1, 3)


def test_two_corrections_of_one_head_are_an_error_naming_both(kit):
    plugins = Plugins([Offset(name="one"), Offset(name="two")], head="net.3")
    with pytest.raises(PluginError, match=r"'two' and 'one' both correct the head 'net\.3'|'one' and 'two'"):
        kit.trainer(plugins).validate(kit.Net(), kit.loader(), verbose=False)


def test_an_offset_of_the_wrong_shape_or_without_a_head_is_refused(kit):
    class Wrong(Offset):
        @hookimpl
        def gw_check(self, run):
            return run.offset(self.name, torch.zeros(5)) if run.ready else None

    with pytest.raises(PluginError, match=r"shape \(5,\)"):
        kit.trainer(Plugins([Wrong()], head="net.3")).validate(kit.Net(), kit.loader(), verbose=False)
    with pytest.raises(PluginError, match=r"needs the head"):
        kit.trainer(Offset()).validate(kit.Net(), kit.loader(), verbose=False)


@pytest.mark.parametrize("called_before", [False, True])
def test_an_offset_that_a_compiled_model_would_bypass_is_refused(kit, called_before):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    module = Module().eval()
    torch.compiler.reset()
    if called_before:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                module(torch.zeros(8, 8))
    trainer = kit.trainer(Plugins([Offset()], head="net._orig_mod.3"))
    if called_before:
        with pytest.raises(PluginError, match=r"'offset' cannot correct the scores.*compiled"):
            trainer.validate(module, kit.loader(), verbose=False)
    else:
        trainer.validate(module, kit.loader(), verbose=False)


def test_a_bypassed_offset_is_refused_in_training_too(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    class Late(Plugin):
        name = "late"

        @hookimpl
        def gw_check(self, run):
            return run.offset("late", torch.ones(3)) if run.ready else None

    torch.compiler.reset()
    module = Module()
    for train in (False, True):
        module.train(train)(torch.randn(8, 8))
        with torch.no_grad():
            module(torch.randn(8, 8))
    with pytest.raises(PluginError, match="'late' cannot correct the scores"):
        kit.fit(module, Plugins([Late()], head="net._orig_mod.3"))


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


def test_a_wrong_head_is_raised_together_with_other_problems(kit):
    from groundwire import Problem

    class Unhappy(Plugin):
        @hookimpl
        def gw_check(self, run):
            return [Problem("unhappy", "is unhappy")] if run.ready else []

    with pytest.raises(PluginError, match=r"(?s)head='nope'.*unhappy|unhappy.*head='nope'"):
        kit.fit(kit.Net(), Plugins([Unhappy()], head="nope"))


def test_averaging_is_refused_for_offsets_and_checked_in_fit_only(kit):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.raises(PluginError, match="EMAWeightAveraging copied the model before 'offset'"):
        kit.fit(kit.Net(), Plugins([Offset()], head="net.3"), EMAWeightAveraging())
    kit.trainer(EMAWeightAveraging(), Surgery()).validate(kit.Net(), kit.loader(), verbose=False)
    kit.fit(kit.Net(), Surgery(), EMAWeightAveraging(), Observer())
