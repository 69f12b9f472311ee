"""Provenance in checkpoints, and models that come back from them or leave groundwire."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from groundwire import Plugin, PluginError, export, hookimpl, load
from groundwire.discovery import init_arguments
from groundwire.plain import is_plain, plain_or_repr
from groundwire.services.checkpoint.provenance import KEY, Provenance


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.register_buffer("groundwire_scaling", torch.empty(0))

    def forward(self, weight):
        return weight * self.factor


class Scaling(Plugin):
    name = "scaling"

    def __init__(self, factor=0.5):
        self.factor = factor

    @hookimpl
    def gw_transform_model(self, module):
        for child in list(module.modules()):
            if isinstance(child, nn.Linear) and not parametrize.is_parametrized(child):
                parametrize.register_parametrization(child, "weight", Scale(self.factor))

    @hookimpl
    def gw_export(self, module):
        for child in list(module.modules()):
            if parametrize.is_parametrized(child):
                parametrize.remove_parametrizations(child, "weight")

    @hookimpl
    def gw_provenance(self, run):
        return {"module": type(run.module).__name__, "tensor": torch.ones(1), "many": (1, 2)}


def saved(kit, trainer, **options):
    path = kit.path / "saved.ckpt"
    trainer.save_checkpoint(path, **options)
    return path, torch.load(path, weights_only=True)


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_save_carries_provenance_also_after_fit_and_by_model_checkpoint(kit, weights_only):
    keep = pl.callbacks.ModelCheckpoint(
        kit.path / "kept", every_n_train_steps=2, save_top_k=-1, save_weights_only=weights_only
    )
    trainer = kit.fit(kit.Net(), Scaling(), keep, enable_checkpointing=True)
    during = [torch.load(p, weights_only=True) for p in (kit.path / "kept").iterdir()]
    _, after = saved(kit, trainer, weights_only=weights_only)
    assert len(during) == 2
    for checkpoint in [*during, after]:
        [plugin] = checkpoint[KEY]["plugins"]
        assert (plugin["name"], plugin["init"], plugin["changes"]) == ("scaling", {"factor": 0.5}, "structure")
        assert plugin["facts"] == {"module": "Net", "tensor": "tensor([1.])", "many": [1, 2]}


def test_only_keys_of_ours_are_added(kit):
    plain = saved(kit, kit.fit(kit.Net()), weights_only=False)[1]
    ours = saved(kit, kit.fit(kit.Net(), kit.SAM()), weights_only=False)[1]
    assert set(ours) - set(plain) == {KEY}
    assert ours["callbacks"] == plain["callbacks"]
    assert list(ours["state_dict"]) == list(plain["state_dict"])
    assert list(ours["optimizer_states"][0]["state"][0]) == list(plain["optimizer_states"][0]["state"][0])


def test_the_wrapper_is_put_on_once_and_speaks_for_the_last_run(kit):
    module, trainer = kit.Net(), kit.trainer(Scaling())
    trainer.fit(module, kit.loader())
    trainer.validate(module, kit.loader(), verbose=False)
    provenance = trainer.strategy.save_checkpoint.provenance
    assert isinstance(provenance, Provenance)
    assert provenance is trainer.strategy.load_checkpoint.provenance
    assert provenance.strategy is trainer.strategy
    assert provenance.saving is None


def test_bare_state_dicts_pass_unchanged(kit):
    trainer = kit.fit(kit.Net(), Scaling())
    trainer.strategy.checkpoint_io.save_checkpoint({"a": torch.ones(1)}, kit.path / "bare")
    assert set(torch.load(kit.path / "bare", weights_only=True)) == {"a"}


def test_async_checkpointing(kit):
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    keep = pl.callbacks.ModelCheckpoint(kit.path / "kept")
    trainer = kit.fit(kit.Net(), Scaling(), keep, enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    trainer.strategy.checkpoint_io.teardown()
    [path] = (kit.path / "kept").iterdir()
    assert torch.load(path, weights_only=True)[KEY]["plugins"][0]["name"] == "scaling"


def test_load_gives_the_trained_model_back(kit):
    module = kit.Net()
    path, _ = saved(kit, kit.fit(module, Scaling(0.25)))
    loaded = load(kit.Net, path, plugins=[Scaling(0.25)])
    assert kit.difference(module.state_dict(), loaded.state_dict()) == 0.0
    x = torch.randn(4, 8)
    assert torch.equal(module.eval()(x), loaded.eval()(x))
    assert kit.Net.on_load_checkpoint is pl.LightningModule.on_load_checkpoint


def test_load_makes_plugins_again_by_name_and_names_one_that_is_not_installed(kit, monkeypatch):
    path, _ = saved(kit, kit.fit(kit.Net(), Scaling(0.25)))
    with pytest.raises(PluginError, match="scaling"):
        load(kit.Net, path)
    made = []
    monkeypatch.setattr(
        "groundwire.services.checkpoint.load.load_plugin",
        lambda name, **init: made.append((name, init)) or Scaling(**init),
    )
    load(kit.Net, path)
    assert made == [("scaling", {"factor": 0.25})]


def test_load_of_a_checkpoint_without_plugins_or_hyperparameters(kit):
    class Module(kit.Net):
        def __init__(self, inputs=8, classes=3):
            super().__init__(inputs, classes)
            self.save_hyperparameters()

    path, _ = saved(kit, kit.fit(Module(8, 5)))
    assert load(Module, path).net[3].out_features == 5


def test_other_objects_are_not_unpickled(kit):
    path = kit.path / "evil.ckpt"

    class Evil:
        def __reduce__(self):
            return (open, (str(kit.path / "touched"), "w"))

    torch.save({"state_dict": {}, "hyper_parameters": {"x": Evil()}}, path)
    with pytest.raises(PluginError, match="does not unpickle"):
        load(kit.Net, path)
    assert not (kit.path / "touched").exists()


def test_a_trainer_without_the_plugin_names_it_when_it_resumes(kit):
    path, _ = saved(kit, kit.fit(kit.Net(), Scaling()))
    with pytest.raises(PluginError, match=r"trained with the plugin 'scaling'.*add it to callbacks"):
        kit.fit(kit.Net(), kit.SAM(), ckpt_path=path)
    with pytest.raises(RuntimeError, match="groundwire_scaling"):
        kit.fit(kit.Net(), ckpt_path=path)


def test_plugins_that_left_the_model_alone_may_be_missing(kit):
    path, _ = saved(kit, kit.fit(kit.Net(), kit.SAM()))
    kit.trainer(Scaling.__base__()).validate(kit.Net(), kit.loader(), ckpt_path=path, verbose=False)


def test_export_bakes_and_leaves_the_trained_model_as_it_is(kit):
    module = kit.Net()
    kit.fit(module, Scaling())
    before = copy.deepcopy(module.state_dict())
    plain = export(module)
    assert set(plain.state_dict()) == set(kit.Net().state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(module.eval()(x), plain.eval()(x))
    assert kit.difference(before, module.state_dict()) == 0.0
    kit.Net().load_state_dict(plain.state_dict())


def test_export_refuses_what_belongs_to_a_plugin_that_it_does_not_know(kit):
    module = kit.Net()
    kit.fit(module, Scaling())
    stranger = copy.deepcopy(module)
    with pytest.raises(PluginError, match=r"parts of the plugin scaling"):
        export(stranger)
    assert set(export(stranger, plugins=[Scaling()]).state_dict()) == set(kit.Net().state_dict())


def test_export_runs_in_reverse_order(kit):
    calls = []

    def make(name):
        return type(name, (Plugin,), {"name": name, "gw_export": hookimpl(lambda self, module: calls.append(name))})()

    module = kit.Net()
    kit.fit(module, make("a"), make("b"), max_steps=1)
    export(module)
    assert calls == ["b", "a"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(plain)
def test_plain_values_stay_as_they_are(value):
    assert is_plain(value)
    assert plain_or_repr(value) == value


@given(st.one_of(st.binary(), st.complex_numbers(), st.frozensets(st.integers()), st.dates()))
def test_other_values_become_plain(value):
    assert not is_plain(value)
    assert is_plain(plain_or_repr({"x": [value]}))


def test_init_arguments_make_an_equal_plugin():
    plugin = Scaling(0.125)
    assert Scaling(**init_arguments(plugin)).factor == 0.125


def test_a_plugin_that_cannot_tell_its_facts_leaves_no_run_open(kit):
    class Broken(Plugin):
        @hookimpl
        def gw_provenance(self, run):
            raise RuntimeError("no facts")

    trainer = kit.trainer(Broken())
    with pytest.raises(RuntimeError, match="no facts"):
        trainer.fit(kit.Net(), kit.loader())
    assert [type(c).__name__ for c in trainer.callbacks] == ["Broken"]
    assert "_build_kwargs" not in vars(trainer.fit_loop.epoch_loop)


def test_a_shift_is_remembered_as_changed_scores(kit):
    class Moves(Plugin):
        changes = "shift"

    path, checkpoint = saved(kit, kit.fit(kit.Net(), Moves()))
    assert checkpoint[KEY]["plugins"][0]["changes"] == "scores"
    with pytest.warns(UserWarning, match="'moves'.*scores will differ"):
        kit.trainer(kit.SAM()).validate(kit.Net(), kit.loader(), ckpt_path=path, verbose=False)


def test_export_refuses_a_structure_that_nobody_takes_out(kit):
    class OneWay(Plugin):
        name = "oneway"

        @hookimpl
        def gw_transform_model(self, module):
            if not parametrize.is_parametrized(module.net[0]):
                parametrize.register_parametrization(module.net[0], "weight", Scale(0.5))

    module = kit.Net()
    kit.fit(module, OneWay())
    with pytest.raises(PluginError, match="oneway changed the model and has no gw_export"):
        export(module)


def test_export_after_two_runs_with_two_objects_of_one_class(kit):
    module = kit.Net()
    kit.fit(module, Scaling())
    kit.trainer(Scaling()).test(module, kit.loader(), verbose=False)
    assert set(export(module).state_dict()) == set(kit.Net().state_dict())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None, [1], {"a": torch.zeros(1)}])
def test_files_that_are_no_checkpoints_are_named(kit, content):
    path = kit.path / "file.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(PluginError, match=r"file\.ckpt (is not a (Lightning )?checkpoint|holds objects other)"):
        load(kit.Net, path)


@pytest.mark.parametrize("entry", [3, {"plugins": "x"}, {"plugins": [1]}, {"plugins": [{"name": "x", "init": 3}]}])
def test_a_damaged_entry_does_not_stop_a_resume(kit, entry):
    path, checkpoint = saved(kit, kit.fit(kit.Net(), kit.SAM()), weights_only=False)
    torch.save({**checkpoint, KEY: entry}, path)
    kit.fit(kit.Net(), kit.SAM(), ckpt_path=path)
    load(kit.Net, path)


def test_a_script_class_does_not_take_the_distribution_of_an_installed_plugin(kit, monkeypatch):
    from groundwire.discovery import Installed

    rows = (Installed("scaling", "elsewhere:Scaling", "groundwire-scaling", "9.9", "found"),)
    monkeypatch.setattr("groundwire.services.checkpoint.provenance.installed", lambda: rows)
    _, checkpoint = saved(kit, kit.fit(kit.Net(), Scaling()))
    assert checkpoint[KEY]["plugins"][0]["dist"] is None
