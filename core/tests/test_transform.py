"""A change of the model's structure: wherever it is built, once, and before weights are restored."""

import copy

import lightning.pytorch as pl
import pytest
from core_model_plugins import Observer, Surgery

from groundwire import PluginError


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


@pytest.mark.ddp
def test_a_transform_in_child_processes_only_is_refused(kit):
    with pytest.raises(Exception, match=r"surgery: the model would change in the child processes"):
        kit.fit(kit.Net(), Surgery(), strategy="ddp_fork", devices=1, accelerator="cpu")


def test_averaging_is_checked_in_fit_only(kit):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    kit.trainer(EMAWeightAveraging(), Surgery()).validate(kit.Net(), kit.loader(), verbose=False)
    kit.fit(kit.Net(), Surgery(), EMAWeightAveraging(), Observer())
