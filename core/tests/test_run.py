"""Opening and closing a run: order, conflicts, stages, and nothing left behind."""

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groundwire import Fields, Finding, Plugin, PluginError, Plugins, Problem, hookimpl
from groundwire.host import Host, host_of
from groundwire.order import name_of, resolve


class Recorder(Plugin):
    """Writes down what happens to it."""

    name = "recorder"

    def __init__(self, name=None):
        if name:
            self.name = name
        self.events = []

    @hookimpl
    def gw_check(self, run):
        self.events.append(("check", run.ready, run.stage))

    @hookimpl
    def gw_findings(self, run):
        self.events.append(("findings", run.stage))


class Forgetful(Recorder):
    """Overrides Lightning hooks and forgets super()."""

    name = "forgetful"

    def setup(self, trainer, pl_module, stage):
        self.events.append(("setup", stage))

    def teardown(self, trainer, pl_module, stage):
        self.events.append(("teardown", stage))


def state(trainer, module):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    names = set(vars(module)) - {"_hparams"}
    return trainer.callbacks, names, set(vars(trainer.strategy)), hooks, list(module.state_dict())


def test_all_stages_leave_nothing_behind(kit):
    module, plugin = kit.Net(), Forgetful()
    trainer = kit.trainer(plugin, max_epochs=2)
    before = state(trainer, module)
    trainer.fit(module, kit.loader(), kit.loader())
    assert state(trainer, module) == before
    trainer.validate(module, kit.loader(), verbose=False)
    trainer.test(module, kit.loader(), verbose=False)
    trainer.predict(module, kit.loader())
    trainer.fit(module, kit.loader(), kit.loader())
    assert state(trainer, module) == before
    expected = []
    for stage in ("fit", "validate", "test", "predict", "fit"):
        shown = "train" if stage == "fit" else stage
        expected += [("check", False, shown), ("setup", stage), ("check", True, shown), ("teardown", stage)]
    assert [event for event in plugin.events if event[0] != "findings"] == expected


def test_check_is_called_twice_a_run_and_tells_when_it_is_ready(kit):
    plugin = Recorder()
    kit.fit(kit.Net(), plugin)
    assert [e for e in plugin.events if e[0] == "check"] == [("check", False, "train"), ("check", True, "train")]


def test_findings_are_asked_at_the_end_of_each_validation_and_of_training(kit):
    plugin = Recorder()
    kit.fit(kit.Net(), plugin, val=kit.loader(), max_epochs=2)
    stages = [e[1] for e in plugin.events if e[0] == "findings"]
    assert stages == ["validate", "validate", "train"]


def test_an_author_who_forgets_super_loses_nothing(kit):
    calls = []

    class Rude(Plugin):
        def setup(self, trainer, pl_module, stage):
            calls.append("setup")

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            calls.append("mine")

        @hookimpl
        def gw_gradient(self, step):
            calls.append("gradient")

    kit.fit(kit.Net(), Rude(), max_steps=1)
    assert calls == ["setup", "gradient", "mine"]


def test_a_setup_inherited_from_a_mixin_opens_the_run_too(kit):
    class Mixin:
        def setup(self, trainer, pl_module, stage):
            self.was_open = host_of(trainer) is not None

    class Mixed(Mixin, Plugin):
        pass

    plugin = Mixed()
    kit.fit(kit.Net(), plugin, max_steps=1)
    assert plugin.was_open


def test_alone_and_in_a_bundle_are_the_same(kit):
    class Counter(Plugin):
        name = "counter"

        def __init__(self):
            self.steps = 0

        def on_train_batch_end(self, *args):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state_dict):
            self.steps = state_dict["steps"]

    def run(wrap, ckpt_path=None, max_epochs=1):
        module, plugin = kit.Net(), Counter()
        trainer = kit.fit(module, wrap(plugin), ckpt_path=ckpt_path, max_epochs=max_epochs)
        path = kit.path / f"{wrap.__name__}{max_epochs}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        return torch.load(path, weights_only=True), path, plugin

    def alone(plugin):
        return plugin

    def bundled(plugin):
        return Plugins([plugin])

    first, path, _ = run(alone)
    second, other, _ = run(bundled)
    assert (
        first["callbacks"]
        == second["callbacks"]
        == {"test_alone_and_in_a_bundle_are_the_same.<locals>.Counter": {"steps": 5}}
    )
    assert kit.difference(first["state_dict"], second["state_dict"]) == 0.0
    assert run(bundled, path, 2)[2].steps == run(alone, other, 2)[2].steps == 10


def test_items_of_a_bundle_that_are_ordinary_callbacks_work(kit):
    seen = []

    class Plain(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append("start")

    kit.fit(kit.Net(), Plugins([Plain(), Recorder()]), max_steps=1)
    assert seen == ["start"]


def test_items_switched_off_take_no_part(kit):
    one, two = Recorder("one"), Recorder("two")
    kit.fit(kit.Net(), Plugins([one, two], off=["two"]), max_steps=1)
    assert one.events
    assert not two.events


def test_the_order_by_name_holds_for_lightnings_own_hooks_too(kit):
    calls = []

    def make(name, **relations):
        def on_train_start(self, trainer, pl_module):
            calls.append(name)

        return type(name, (Plugin,), {"name": name, "on_train_start": on_train_start, **relations})()

    kit.fit(kit.Net(), make("a", after=("b",)), make("c"), make("b", after=("c",)), max_steps=1)
    assert calls == ["c", "b", "a"]


def test_the_users_list_comes_back_in_the_users_order(kit):
    first, second = type("A", (Plugin,), {"after": ("b",)})(), type("B", (Plugin,), {})()
    trainer = kit.fit(kit.Net(), first, second, max_steps=1)
    assert trainer.callbacks == [first, second]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: [Recorder(), Recorder()], r"Recorder and Recorder are both named 'recorder'"),
        (lambda: [Plugins([Plugins([Recorder()])])], r"a Plugins is inside another"),
        (lambda: [Plugins([Recorder()]), Plugins()], r"2 Plugins are in one Trainer"),
        (lambda: [Plugins([Recorder()], off=["recorders"])], r"off='recorders' is none of its items \(recorder\)"),
        (lambda: [plugin("a", before=("b",)), plugin("b", before=("a",))], r"cycle: (a -> b -> a|b -> a -> b)"),
        (lambda: [plugin("a", conflicts=("b",)), plugin("b")], r"a: conflicts with 'b'"),
        (lambda: [plugin("a", requires=("z",)), plugin("b")], r"a: requires 'z'; this run has a, b"),
    ],
)
def test_bad_lists_of_plugins_are_refused(kit, make, text):
    trainer = kit.trainer(*make())
    before = list(trainer.callbacks)
    with pytest.raises(PluginError, match=text):
        trainer.fit(kit.Net(), kit.loader())
    assert trainer.callbacks == before


def test_the_same_object_twice_is_refused(kit):
    same = Recorder()
    with pytest.raises(PluginError, match="the same Recorder object is listed twice"):
        kit.fit(kit.Net(), same, Plugins([same]))


def plugin(name, **relations):
    return type(name, (Plugin,), {"name": name, **relations})()


@pytest.mark.parametrize(
    ("hook", "arguments", "texts"),
    [
        ("gw_scorez", "scores", ["gw_scorez", "did you mean gw_scores"]),
        ("gw_scores", "scores, feilds", ["'feilds'", "did you mean 'fields'"]),
    ],
)
def test_misspelled_hooks_and_arguments_name_the_nearest(kit, hook, arguments, texts):
    namespace = {}
    exec(f"def {hook}(self, {arguments}): pass", namespace)
    wrong = type("Wrong", (Plugin,), {"name": "wrong", hook: hookimpl(namespace[hook])})()
    with pytest.raises(PluginError) as caught:
        kit.fit(kit.Net(), wrong)
    assert all(text in str(caught.value) for text in ["wrong", *texts])


def test_a_hook_without_the_marker_is_refused(kit):
    class Unmarked(Plugin):
        def gw_scores(self, scores):
            pass

    with pytest.raises(PluginError, match=r"Unmarked\.gw_scores is not marked.*@hookimpl"):
        kit.fit(kit.Net(), Unmarked())


def test_all_problems_of_all_plugins_are_raised_together(kit):
    def make(name):
        @hookimpl
        def gw_check(self, run):
            return [Problem(name, f"{name} is unhappy", "cheer up")] if not run.ready else None

        return plugin(name, gw_check=gw_check)

    with pytest.raises(PluginError, match=r"(?s)a: a is unhappy -> cheer up.*b: b is unhappy"):
        kit.fit(kit.Net(), make("a"), make("b"))


def test_problems_of_the_second_check_come_before_the_first_batch(kit):
    class Late(Plugin):
        @hookimpl
        def gw_check(self, run):
            return [Problem("late", f"{len(run.trainer.optimizers)} optimizer")] if run.ready else []

    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training must not start")

    module = Module()
    trainer = kit.trainer(Late())
    with pytest.raises(PluginError, match="late: 1 optimizer"):
        trainer.fit(module, kit.loader())
    assert not any(isinstance(c, Host) for c in trainer.callbacks)


@pytest.mark.parametrize(
    "place",
    [
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_train_batch_end",
        "on_validation_epoch_end",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ],
)
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_anywhere_closes_the_run_and_the_next_fit_works(kit, place, error):
    class Breaks(pl.Callback):
        broken = True

        def fail(self, *args, **kwargs):
            if self.broken:
                raise error

    breaks = type("Breaks", (Breaks,), {place: Breaks.fail})()
    module, recorder = kit.Net(), Recorder()
    trainer = kit.trainer(recorder, kit.SAM(), breaks)
    before = state(trainer, module)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(module, kit.loader(), kit.loader())
    assert state(trainer, module) == before
    Breaks.broken = False
    module.train()  # Lightning leaves evaluation mode behind after an exception in validation
    again = kit.fit(module, recorder, kit.SAM(), breaks, val=kit.loader())
    assert again.global_step == 5


def test_one_plugin_object_in_two_trainers(kit):
    sam = kit.SAM()
    results = []
    for _ in range(2):
        module = kit.Net()
        kit.fit(module, sam)
        results.append(module.state_dict())
    assert kit.difference(*results) == 0.0


def test_fast_dev_run_overfit_batches_and_limits(kit):
    for options in ({"fast_dev_run": True}, {"overfit_batches": 2}, {"limit_train_batches": 2}, {"max_steps": 3}):
        kit.fit(kit.Net(), kit.SAM(), Recorder(), val=kit.loader(), **options)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_barebones(kit):
    off = dict.fromkeys(kit.QUIET.keys() - {"accelerator"})
    kit.fit(kit.Net(), kit.SAM(), Recorder(), val=kit.loader(), barebones=True, **off)


@pytest.mark.filterwarnings("ignore:.*Could not find.*")
def test_lr_find_leaves_nothing_behind(kit):
    from lightning.pytorch.tuner import Tuner

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module, plugin = Module(), kit.SAM()
    trainer = kit.trainer(plugin, max_epochs=20)
    names = set(vars(trainer.strategy))
    Tuner(trainer).lr_find(module, kit.loader(), num_training=20, update_attr=False)
    assert trainer.callbacks == [plugin]
    assert set(vars(trainer.strategy)) == names
    assert "configure_model" not in vars(module)


def test_optimizers_that_carry_hooks_join_the_run(kit):
    class HookedSGD(torch.optim.SGD):
        name = "hooked"
        calls = 0

        @hookimpl
        def gw_gradient(self, step, run):
            type(self).calls += 1
            assert run.owner == "hooked"

        @hookimpl
        def gw_check(self, run):
            return None if run.ready else [Problem("hooked", "is never asked before it exists")]

    class Module(kit.Net):
        def configure_optimizers(self):
            return HookedSGD(self.parameters(), lr=0.1)

    kit.fit(Module(), Plugins())
    assert HookedSGD.calls == 5
    with pytest.raises(PluginError, match=r"HookedSGD implements groundwire hooks.*add groundwire\.Plugins\(\)"):
        kit.fit(Module())
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    HookedSGD([parameter], lr=0.5).step()  # without Lightning it is the optimizer that it is built on
    assert parameter.item() == 0.5
    with pytest.raises(PluginError, match="'hooked' and 'sam' both own"):
        kit.fit(Module(), kit.SAM())


def test_fields_come_from_the_user_then_the_module_then_core(kit):
    found = []

    class Asks(Plugin):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append(host_of(trainer).fields(batch).source)

    class Module(kit.Net):
        @hookimpl
        def gw_fields(self, batch):
            return Fields(batch[0], batch[1], source="module")

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return kit.loader()

        @hookimpl
        def gw_fields(self, batch):
            return Fields(batch[0], source="datamodule")

    kit.fit(kit.Net(), Asks(), max_steps=1)
    kit.fit(Module(), Asks(), max_steps=1)
    kit.fit(Module(), Plugins([Asks()], fields=lambda b: Fields(b[0], source="given")), max_steps=1)
    kit.fit(Module(), Plugins([Asks()], fields=lambda b: None), max_steps=1)
    kit.trainer(Asks(), max_steps=1).fit(kit.Net(), datamodule=Data())
    assert found == [None, "module", "given", "module", "datamodule"]


def test_a_batch_nobody_can_read_is_named(kit):
    class Asks(Plugin):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            host_of(trainer).fields({"foo": 1, "bar": 2})

    with pytest.raises(PluginError, match=r"keys \['foo', 'bar'\].*Plugins\(fields="):
        kit.fit(kit.Net(), Asks(), max_steps=1)


def test_run_log_prefixes_the_plugins_name_everywhere(kit):
    class Logs(Plugin):
        name = "logs"

        @hookimpl
        def gw_gradient(self, step, run):
            run.log("in_step", 1.0)

        @hookimpl
        def gw_findings(self, run):
            run.log(f"at_{run.stage}", 2.0)

    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    trainer = kit.fit(kit.Net(), Logs(), val=kit.loader(), logger=logger, log_every_n_steps=1)
    assert {"logs/in_step", "logs/at_validate"} <= set(trainer.callback_metrics)
    assert "logs/at_train" in (kit.path / "metrics.csv").read_text()


def test_step_seed_depends_on_the_step_and_the_global_seed_only(kit, monkeypatch):
    seeds = []

    class Look(Plugin):
        @hookimpl
        def gw_gradient(self, step, run):
            seeds.append(run.step_seed)

    kit.fit(kit.Net(), Look())
    kit.fit(kit.Net(), Look())
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    kit.fit(kit.Net(), Look())
    assert seeds[:5] == seeds[5:10]
    assert len(set(seeds)) == 10


def test_a_hook_that_returns_something_else_is_named(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_findings(self):
            return Finding("wrong", "x", "info", 1, "not in a list")

    with pytest.raises(PluginError, match="wrong: gw_findings must return a list of Finding or None, got Finding"):
        kit.fit(kit.Net(), Wrong())


def test_named_instances_have_states_of_their_own():
    assert Recorder("a").state_key != Recorder("b").state_key
    assert Recorder().state_key == "Recorder"


names = st.lists(st.sampled_from("abcdef"), unique=True, min_size=1)


@given(names, st.data())
def test_resolved_orders_respect_relations_and_stay_near_the_users(order, data):
    acyclic = data.draw(st.permutations(order))
    after = {n: tuple(data.draw(st.lists(st.sampled_from(acyclic[: acyclic.index(n)] or ["z"])))) for n in order}
    plugins = [type(n, (), {"name": n, "after": after[n]})() for n in order]
    resolved, problems = resolve(plugins)
    found = [name_of(p) for p in resolved]
    assert not problems
    assert sorted(found) == sorted(order)
    assert all(found.index(m) < found.index(n) for n in order for m in after[n] if m in order)
    if not any(after.values()) or all(set(after[n]) <= {"z"} for n in order):
        assert found == order


def test_a_plain_module_is_not_asked_for_hooks_by_property(kit):
    class Module(kit.Net):
        @property
        def dangerous(self):
            raise AssertionError("evaluated")

    kit.fit(Module(), Recorder(), max_steps=1)
    assert isinstance(Module().net, nn.Sequential)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_run_log_works_where_lightning_forbids_it_in_both_packages(kit, package):
    package = pytest.importorskip(package)
    got = []

    class Logger(package.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            got.append(metrics)

    class Logs(Plugin):
        @hookimpl
        def gw_findings(self, run):
            run.log("at_end", 2.0)

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = kit.network()

        training_step = lambda self, batch: nn.functional.cross_entropy(self.net(batch[0]), batch[1])  # noqa: E731
        configure_optimizers = kit.Net.configure_optimizers

    kit.fit(Module(), Logs(), package=package, logger=Logger(kit.path))
    assert {"logs/at_end": 2.0} in got


def test_run_log_weights_batches_as_lightning_does(kit):
    class Logs(Plugin):
        score_stages = ("validate",)

        @hookimpl
        def gw_scores(self, scores, run):
            run.log("mean", scores.mean())

    class Module(kit.Net):
        def validation_step(self, batch, batch_idx):
            self.log("mean", self(batch[0]).mean())

    from torch.utils.data import DataLoader

    trainer = kit.trainer(Logs())
    trainer.validate(Module(), DataLoader(kit.data(9), 8), verbose=False)
    assert float(trainer.callback_metrics["logs/mean"]) == pytest.approx(float(trainer.callback_metrics["mean"]))


@pytest.mark.parametrize(
    ("hook", "value", "text"),
    [
        ("gw_check", ["no"], "gw_check must return a list of Problem or None, got str"),
        ("gw_findings", [("a", 1)], "gw_findings must return a list of Finding or None, got tuple"),
        ("gw_section", "text", "gw_section must return Section or None, got str"),
        ("gw_provenance", 5, "gw_provenance must return Mapping or None, got int"),
    ],
)
def test_wrong_answers_name_the_plugin_and_the_hook(kit, hook, value, text):
    wrong = type("Wrong", (Plugin,), {"name": "wrong", hook: hookimpl(lambda self: value)})()
    with pytest.raises(PluginError, match=f"wrong: {text}"):
        kit.fit(kit.Net(), wrong)


def test_hooks_of_a_newer_groundwire_may_be_marked_optional_and_wrappers_are_refused(kit):
    optional = type("New", (Plugin,), {"gw_tomorrow": hookimpl(optionalhook=True)(lambda self: None)})()
    kit.fit(kit.Net(), optional, max_steps=1)
    wrapper = type("Wraps", (Plugin,), {"gw_findings": hookimpl(wrapper=True)(lambda self: (yield))})()
    with pytest.raises(PluginError, match="gw_findings is a wrapper"):
        kit.fit(kit.Net(), wrapper)


def test_bundles_take_plugins_only():
    with pytest.raises(TypeError, match=r"items must be a list of callbacks"):
        Plugins(Recorder())
    with pytest.raises(TypeError, match=r"items must be a list of callbacks"):
        Plugins([1])
    with pytest.raises(TypeError, match=r"has the class Recorder -> make one: Recorder\(\)"):
        Plugins([Recorder])
