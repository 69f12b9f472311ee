"""Wrong hooks, wrong answers and problems are told with the plugin, the hook and the nearest name."""

import pytest
from core_recorders import plugin

from groundwire import Finding, Plugin, PluginError, Problem, hookimpl
from groundwire.host import Host


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


def test_a_hook_that_returns_something_else_is_named(kit):
    class Wrong(Plugin):
        @hookimpl
        def gw_findings(self):
            return Finding("wrong", "x", "info", 1, "not in a list")

    with pytest.raises(PluginError, match="wrong: gw_findings must return a list of Finding or None, got Finding"):
        kit.fit(kit.Net(), Wrong())


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
