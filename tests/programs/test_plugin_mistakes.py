"""Mistakes of plugin authors are told, with the plugin's name and the hook's."""

import pytest

from groundwire import Plugin, PluginError, hookimpl


def stops(*arguments, **named):
    raise StopIteration("the plugin's own iterator is empty")


class InGradient(Plugin):
    name = "stopping"

    @hookimpl
    def gw_gradient(self, step):
        stops()


class InEdit(Plugin):
    name = "stopping"

    @hookimpl
    def gw_gradient_edit(self, step):
        stops()


class InBackward(Plugin):
    name = "stopping"

    @hookimpl
    def gw_backward_done(self, phase):
        stops()


class InScores(Plugin):
    name, score_stages = "stopping", ("train",)

    @hookimpl
    def gw_scores(self, scores):
        stops()


class InRows(Plugin):
    name = "stopping"

    @hookimpl
    def gw_train_data(self, data):
        stops()


class InFindings(Plugin):
    name = "stopping"

    @hookimpl
    def gw_findings(self, run):
        stops()


@pytest.mark.parametrize(
    ("plugin", "hook"),
    [
        (InGradient, "gw_gradient"),
        (InEdit, "gw_gradient_edit"),
        (InBackward, "gw_backward_done"),
        (InScores, "gw_scores"),
        (InRows, "gw_train_data"),
        (InFindings, "gw_findings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stop_iteration_of_a_hook_is_an_error(kit, plugin, hook):
    with pytest.raises(PluginError, match=rf"(?s)stopping.*{hook}"):
        kit.fit(kit.Net(), plugin(), val=kit.loader())


class Returns(Plugin):
    name = "returns"

    @hookimpl
    def gw_gradient_edit(self, step):
        return {name: 0 * grad for name, grad in step.grads.items()}


def test_an_edit_that_returns_gradients_in_place_of_editing_them_is_told(kit):
    with pytest.raises(PluginError, match=r"(?s)returns.*gw_gradient_edit"):
        kit.fit(kit.Net(), Returns())


def spelled(attribute, value):
    return type("Spelled", (Plugin,), {"name": "spelled", attribute: value, "gw_check": hookimpl(lambda self: [])})


@pytest.mark.parametrize(
    ("wrong", "value", "right"),
    [
        ("need_ids", True, "needs_ids"),
        ("score_stage", ("train",), "score_stages"),
        ("need_features", True, "needs_features"),
        ("require", ("cram",), "requires"),
        ("conflict", ("cram",), "conflicts"),
        ("skip_nonfinite", True, "skips_nonfinite"),
    ],
)
def test_a_misspelled_class_attribute_is_told_as_a_misspelled_hook_is(kit, wrong, value, right):
    with pytest.raises(PluginError, match=rf"(?s)spelled.*{wrong}.*{right}"):
        kit.fit(kit.Net(), spelled(wrong, value)())


@pytest.mark.parametrize("attribute", ["needs_weights", "scale", "stages", "header", "afterwards", "names"])
def test_attributes_of_the_authors_own_are_left_alone(kit, attribute):
    kit.fit(kit.Net(), spelled(attribute, 1)())
