"""The ends of a run: what is collected last, and what a checkpoint of a crash holds."""

import copy
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from groundwire import Finding, Plugin, Plugins, hookimpl


class Masks(Plugin):
    """Has state in a run, and undoes it in its own ``on_exception``, as Lightning's callbacks do."""

    name = "masks"

    def __init__(self):
        self.state, self.closed = {}, 0

    @hookimpl
    def gw_check(self, run):
        if run.ready:
            run.on_close(self.close)

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.state["batches"] = self.state.get("batches", 0) + 1

    def on_exception(self, trainer, pl_module, exception):
        self.state.clear()

    def close(self):
        self.closed += 1

    def state_dict(self):
        return self.state


class Crashes:
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("bundled", [False, True], ids=["listed", "bundled"])
@pytest.mark.parametrize("which", ["OnExceptionCheckpoint", "save_on_exception"])
def test_a_crash_checkpoint_holds_what_on_exception_undoes(kit, error, bundled, which):
    class Module(Crashes, kit.Net):
        pass

    module, plugin = Module(), Masks()
    module.error = error
    saves = (
        OnExceptionCheckpoint(kit.path / "kept")
        if which == "OnExceptionCheckpoint"
        else ModelCheckpoint(kit.path / "kept", save_on_exception=True)
    )
    callbacks = [Plugins([plugin], report=False) if bundled else plugin, saves]
    trainer = kit.trainer(*callbacks, enable_checkpointing=True)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(module, kit.loader())
    [path] = (kit.path / "kept").iterdir()
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["callbacks"][plugin.state_key] == {"batches": 3}
    assert [p["name"] for p in checkpoint["groundwire"]["plugins"]] == ["masks"]
    assert (plugin.closed, plugin.state, plugin.state_dict()) == (1, {}, {})
    assert "state_dict" not in vars(plugin)
    assert trainer.callbacks[:1] == callbacks[:1]


def test_a_run_that_nobody_closed_is_closed_by_the_next(kit):
    class Module(Crashes, kit.Net):
        error = RuntimeError("broken")

    class Breaks(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise ValueError("in on_exception")

    plugin, callback = Masks(), Breaks()
    trainer = kit.trainer(plugin, callback)
    with pytest.raises(ValueError, match="in on_exception"):
        trainer.fit(Module(), kit.loader())
    trainer.fit(kit.Net(), kit.loader())
    assert plugin.closed == 2
    assert trainer.callbacks[:2] == [plugin, callback]
    assert not {"on_exception", "on_train_end"} & set(vars(trainer.strategy))


class Weighs(Plugin):
    """Reports a weight at the end of training, and of each checkpoint."""

    name = "weighs"

    @hookimpl
    def gw_findings(self, run):
        return [Finding("weighs", "first", "info", float(run.module.net[0].weight.detach().flatten()[0]), "")]

    @hookimpl
    def gw_provenance(self, checkpoint):
        return {"first": float(checkpoint["state_dict"]["net.0.weight"].flatten()[0])}


def reported(trainer):
    [file] = (Path(trainer.default_root_dir) / "groundwire").glob("*/findings.json")
    return [f["value"] for f in json.loads(file.read_text())["findings"]]


def test_final_findings_see_what_the_modules_own_on_train_end_leaves(kit):
    class Module(kit.Net):
        def on_train_end(self):
            with torch.no_grad():
                self.net[0].weight.fill_(7.0)

    assert reported(kit.fit(Module(), Weighs())) == [7.0]


def test_final_findings_see_averaged_weights(kit):
    module = kit.Net()
    trainer = kit.fit(module, Weighs(), EMAWeightAveraging(decay=0.5), max_epochs=2)
    assert reported(trainer) == [float(module.net[0].weight.detach().flatten()[0])]


def test_provenance_is_asked_of_the_checkpoint(kit):
    keep = ModelCheckpoint(kit.path / "kept", every_n_train_steps=2, save_top_k=-1)
    averaging = EMAWeightAveraging(decay=0.5)
    trainer = kit.fit(kit.Net(), Weighs(), averaging, keep, enable_checkpointing=True)
    trainer.save_checkpoint(kit.path / "kept" / "after.ckpt", weights_only=True)
    paths = list((kit.path / "kept").iterdir())
    assert len(paths) == 3
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        [plugin] = checkpoint["groundwire"]["plugins"]
        assert plugin["facts"]["first"] == float(checkpoint["state_dict"]["net.0.weight"].flatten()[0])


def test_a_search_for_a_learning_rate_collects_no_final_findings(kit):
    class Module(kit.Net):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = pl.callbacks.LearningRateFinder(num_training_steps=4, update_attr=False)
    asked = []

    class Asked(Weighs):
        @hookimpl
        def gw_findings(self, run):
            asked.append(run.trainer.global_step)

    kit.fit(Module(), Asked(), finder)
    assert asked == [5]


def test_a_plugin_that_holds_its_view_of_the_run_is_copied(kit):
    class Holds(Plugin):
        @hookimpl
        def gw_check(self, run):
            self.run = run

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            self.copies = copy.deepcopy([c for c in trainer.callbacks if c is not self])

    copies = Copies()
    kit.fit(kit.Net(), Holds(), copies)
    assert "Holds" in [type(c).__name__ for c in copies.copies]
