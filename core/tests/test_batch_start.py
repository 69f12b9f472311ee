"""``gw_batch_start``: called before the forward passes of each batch, and what a replayed batch gets back of it."""

import warnings

import pytest
import torch
from core_model_plugins import Shift
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import groundwire
from groundwire import Plugin, PluginError, Plugins, Variant, hookimpl
from groundwire.modules import shift_hooks


class Starts(Plugin):
    """Writes down each call, and returns its number."""

    def __init__(self, name="starts"):
        self.name, self.calls = name, []

    @hookimpl
    def gw_batch_start(self, batch, stage, variant, first_result):
        self.calls.append((stage, variant, first_result))
        return len(self.calls)

    def stages(self):
        return [stage for stage, _, _ in self.calls]


def test_every_batch_of_every_stage_is_told(kit):
    starts, module = Starts(), kit.Net()
    trainer = kit.fit(module, starts, val=kit.loader(), num_sanity_val_steps=2)
    assert starts.stages() == ["sanity"] * 2 + ["train"] * 5 + ["validate"] * 5
    for stage in ("validate", "test"):
        starts.calls.clear()
        getattr(trainer, stage)(module, kit.loader(), verbose=False)
        assert starts.stages() == [stage] * 5
    starts.calls.clear()
    trainer.predict(module, kit.loader())
    assert starts.calls == [("predict", None, None)] * 5


def test_it_comes_after_every_on_train_batch_start_and_before_the_step(kit):
    order = []

    class Module(kit.Net):
        def on_train_batch_start(self, batch, batch_idx):
            order.append("module")
            batch[0] = batch[0] + 1

        def training_step(self, batch, batch_idx):
            order.append("step")
            assert batch[0] is first.batch[0]
            return super().training_step(batch, batch_idx)

    class Late(Plugin):
        def on_train_batch_start(self, *args):
            order.append("callback")

    class First(Starts):
        @hookimpl
        def gw_batch_start(self, batch):
            order.append("start")
            self.batch = batch

    first = First()
    kit.fit(Module(), first, Late(), max_steps=1)
    assert order == ["callback", "module", "start", "step"]


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


def test_a_replay_gives_each_implementation_what_it_returned_itself(kit):
    one, two = Starts("one"), Starts("two")
    two.calls.append(None)
    kit.fit(kit.Net(), one, Replaying(), two, accumulate_grad_batches=2, max_steps=2)
    assert one.calls == [("train", None, first) for first in (None, None, 1, 2, None, None, 5, 6)]
    assert two.calls[1:] == [("train", None, first) for first in (None, None, 2, 3, None, None, 6, 7)]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("manual", [False, True])
def test_each_batch_of_a_window_is_replayed_with_the_shift_that_it_had(kit, rows, manual):
    numbers = iter(range(100))

    def vector(batch, stage, variant):
        shape = (len(batch[0]), 3) if rows else (3,)
        return torch.randn(shape, generator=torch.Generator().manual_seed(next(numbers)))

    class Manual(kit.Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == 0:
                self.optimizers().zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if batch_idx % 2 == 1:
                self.optimizers().step()

    replaying = Replaying()
    replaying.loss_fn = lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1])
    if not manual:
        replaying.loss_fn = None
    batches = [(torch.randn(size, 8), torch.randint(3, (size,))) for size in (4, 6, 6, 4)]
    plugins = Plugins([Shift(vector), replaying], report=False)
    options = {} if manual else {"accumulate_grad_batches": 2}
    kit.trainer(plugins, **options).fit(Manual() if manual else kit.Net(), iter(batches))
    assert replaying.gaps
    assert max(replaying.gaps) < 1e-6


def test_dropout_of_the_first_pass_is_drawn_again_although_the_hook_draws_too(kit):
    class Draws(Plugin):
        @hookimpl
        def gw_batch_start(self, first_result):
            return torch.rand(1) if first_result is None else first_result

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))

    gaps = []

    class Same(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            again = step.replay(same_rng=True)
            gaps.extend(float((again[name] - grad).abs().max()) for name, grad in step.grads.items())

    kit.fit(Module(), Draws(), Same(), max_steps=3)
    assert gaps
    assert max(gaps) == 0.0


class Evaluates(Plugin):
    """Evaluates the model itself and one variant of it."""

    name = "evaluates"

    def __init__(self):
        self.results = []

    @hookimpl
    def gw_variants(self, module):
        from contextlib import nullcontext

        return [Variant("same", nullcontext)]

    @hookimpl
    def gw_findings(self, run):
        if run.stage == "validate":
            self.results = [run.evaluate(variant).metrics for variant in (None, *run.variants())]


def test_an_evaluation_tells_the_variants_name(kit):
    starts = Starts()
    kit.trainer(starts, Evaluates(), limit_val_batches=2).validate(kit.Net(), kit.loader(), verbose=False)
    assert starts.calls == [("validate", None, None)] * 4 + [("validate", "same", None)] * 2


@pytest.mark.parametrize("several", [False, True])
def test_a_shift_that_differs_from_batch_to_batch_does_so_in_an_evaluation_too(kit, several):
    class Module(kit.Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("score", self(batch[0])[:, 1].mean())

    def vector(batch, stage, variant):
        return torch.arange(3.0) * float(batch[0].sum() + (5 if variant else 0))

    evaluates = Evaluates()
    trainer = kit.trainer(Plugins([Shift(vector), evaluates], head="net.3"))
    trainer.validate(Module(), [kit.loader()] * 2 if several else kit.loader(), verbose=False)
    own = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert dict(evaluates.results[0]) == pytest.approx(own)
    assert dict(evaluates.results[1]) == pytest.approx({name: value + 5 for name, value in own.items()}, rel=1e-5)


@pytest.mark.parametrize("late", [False, True], ids=["named", "found"])
def test_raw_scores_are_before_and_scores_after_every_hook_on_the_head(kit, late):
    first, second = Shift(name="first"), Shift(lambda *_: torch.full((3,), 2.0), name="second")
    module = kit.Net()
    trainer = kit.trainer(Plugins([first, second], head=None if late else "net.3"))
    trainer.validate(module, kit.loader(), verbose=False)
    for plugin in (first, second):
        assert torch.allclose(plugin.scores, plugin.raw + 3)
    module.eval()
    assert torch.equal(first.raw, module(kit.data().tensors[0][-8:]))
    trainer.fit(module.train(), kit.loader())
    assert torch.allclose(second.scores, second.raw + 3)


def test_a_shift_of_each_row_of_a_half_precision_head_is_not_rounded(kit):
    shift = Shift(lambda batch, *_: torch.full((len(batch[0]), 3), 3.1416))
    kit.trainer(shift, precision="bf16-mixed").validate(kit.Net(), kit.loader(), verbose=False)
    assert shift.scores.dtype == torch.float32
    assert torch.equal(shift.scores, shift.raw + 3.1416)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_two_ranks_with_batchnorm_shift_each_its_own_rows(kit):
    def vector(batch, *_):
        return batch[0][:, :3].detach() * 2

    class Module(kit.Net):
        def train_dataloader(self):
            return DataLoader(kit.data(), 4, sampler=DistributedSampler(kit.data(), shuffle=False))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert torch.allclose(shift.scores, shift.raw + vector(batch), atol=1e-6)

        def on_train_end(self):
            torch.save([p.detach() for p in self.parameters()], kit.path / f"rank{self.global_rank}.pt")

    shift, replaying = Shift(vector), Replaying()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = kit.trainer(shift, replaying, strategy=strategy, devices=2, use_distributed_sampler=False)
    trainer.fit(Module())
    first, second = (torch.load(kit.path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(map(torch.equal, first, second))


def test_an_averaging_callback_beside_it_trains_and_pairs_no_shift(kit):
    module, keys = kit.Net(), list(kit.Net().state_dict())
    kit.fit(module, Plugins([Shift()], head="net.3"), EMAWeightAveraging(), val=kit.loader())
    assert list(module.state_dict()) == keys


class Told(Plugin):
    """A plugin that was told the head."""

    def __init__(self, head, name="told"):
        self.head, self.name = head, name

    @hookimpl
    def gw_scores(self, run):
        self.found = run.head.name


def test_a_head_can_be_named_to_a_plugin(kit):
    told = Told("net.3")
    kit.trainer(told).validate(kit.Net(), kit.loader(), verbose=False)
    assert told.found == "net.3"
    kit.trainer(Plugins([told], head="net.3")).validate(kit.Net(), kit.loader(), verbose=False)
    with pytest.raises(PluginError, match=r"head='net.0' of Plugins and head='net.3' of told -> name one"):
        kit.trainer(Plugins([told], head="net.0")).validate(kit.Net(), kit.loader(), verbose=False)


def test_what_is_exported_during_a_run_has_no_shift_left(kit):
    class Exports(Shift):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
            assert shift_hooks(pl_module.net[3]) == [self.hook]
            self.plain = groundwire.export(pl_module, plugins=[])

    plugin = Exports()
    module = kit.Net()
    kit.trainer(plugin).validate(module, kit.loader(), verbose=False)
    x = torch.randn(2, 8)
    module.eval()
    with torch.inference_mode():
        assert torch.equal(plugin.plain.eval()(x), module(x))
    assert not shift_hooks(plugin.plain.net[3])


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
            with self.run.extra_pass():
                pl_module(batch[0][:1])
            assert self.run.forward([batch[0][:2], batch[1][:2]]).shape == (2, 3)

        @hookimpl
        def gw_check(self, run):
            self.run = run

        @hookimpl
        def gw_scores(self, scores, fields):
            assert len(scores) == len(fields.inputs)

    kit.trainer(Peeking("net.3")).validate(kit.Net(), kit.loader(), verbose=False)


def test_a_shift_is_gone_when_the_run_is_over(kit):
    module = kit.Net()
    kit.trainer(Shift(lambda batch, *_: torch.ones(len(batch[0]), 3))).validate(module, kit.loader(), verbose=False)
    assert not module.net[3]._forward_hooks
    assert module.eval()(torch.zeros(1, 8)).shape == (1, 3)


def test_a_tuner_that_takes_the_callbacks_away_is_not_told(kit):
    from lightning.pytorch.tuner import Tuner

    class Module(kit.Net):
        lr = 0.1

    starts = Starts()
    trainer = kit.trainer(starts)
    Tuner(trainer).lr_find(Module(), kit.loader(), num_training=5, update_attr=False)
    assert starts.calls == []


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_steps_that_take_the_loaders_iterator_are_refused(kit):
    class Module(kit.Net):
        def training_step(self, dataloader_iter):
            (x, y), _, _ = next(dataloader_iter)
            return nn.functional.cross_entropy(self(x), y)

    with pytest.raises(PluginError, match="starts: training_step takes dataloader_iter"):
        kit.fit(Module(), Starts())
    with pytest.raises(PluginError, match=r"the head of training scores cannot be found -> name it"):
        kit.fit(Module(), Told(None), type("Train", (Told,), {"score_stages": ("train",)})(None, "train"))
    counts = type("Train", (Shift,), {"score_stages": ("train",), "gw_batch_start": None})(head="net.3")
    kit.fit(Module(), counts)
    assert counts.scores.shape == (8, 3)


def test_on_close_is_called_once_also_after_an_exception(kit):
    class Closes(Plugin):
        closed = 0

        @hookimpl
        def gw_check(self, run):
            if run.ready:
                run.on_close(self.close)

        def close(self):
            self.closed += 1

    class Breaks(kit.Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    closes = Closes()
    kit.fit(kit.Net(), closes, max_steps=1)
    assert closes.closed == 1
    with pytest.raises(RuntimeError, match="broken"):
        kit.fit(Breaks(), closes)
    assert closes.closed == 2
