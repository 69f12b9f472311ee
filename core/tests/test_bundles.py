"""The list of plugins: bundles, order, and lists that cannot be."""

import lightning.pytorch as pl
import pytest
import torch
from core_recorders import Recorder, plugin
from hypothesis import given
from hypothesis import strategies as st

from groundwire import Plugin, PluginError, Plugins
from groundwire.hooks.ordering import name_of, resolve


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


def test_bundles_take_plugins_only():
    with pytest.raises(TypeError, match=r"items must be a list of callbacks"):
        Plugins(Recorder())
    with pytest.raises(TypeError, match=r"items must be a list of callbacks"):
        Plugins([1])
    with pytest.raises(TypeError, match=r"has the class Recorder -> make one: Recorder\(\)"):
        Plugins([Recorder])
