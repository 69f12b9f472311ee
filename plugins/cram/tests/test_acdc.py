"""AC/DC in loops that stop, resume, average and fail: sparse when it should be, or refused before training."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from groundwire import PluginError, Report
from groundwire_cram import ACDC
from groundwire_cram.masks import _frozen

pytestmark = [
    # The trainings that resume have no callback that saves, and loaders that begin anew.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

PHASES = {"warmup": 1, "phase": 1, "final_dense": 1, "final_sparse": 1}


def acdc(**options):
    return ACDC(0.8, **{**PHASES, **options})


def zeros(module):
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class Zeros(pl.Callback):
    """The share of zeros after each batch, by epoch; an exception on demand."""

    def __init__(self, fail_at=None, error=RuntimeError):
        self.seen, self.fail_at, self.error = {}, fail_at, error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).append(zeros(pl_module))
        if (trainer.current_epoch, batch_idx) == self.fail_at:
            raise self.error("stop")


@pytest.mark.parametrize("reset_momentum", [False, True])
def test_a_resume_from_any_step_is_bit_identical(kit, reset_momentum):
    """Also from the last step of an epoch, after which Lightning announces no new one. All batches are alike."""
    loader = DataLoader(TensorDataset(*(t[:8].repeat(4, *[1] * (t.dim() - 1)) for t in kit.data().tensors)), 8)
    every = ModelCheckpoint(kit.path, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    options = {"max_epochs": 4, "loader": loader}
    whole = kit.fit(kit.Net(), acdc(reset_momentum=reset_momentum), every, enable_checkpointing=True, **options)
    end = whole.lightning_module.state_dict()
    assert zeros(whole.lightning_module) >= 0.8
    steps = len(list(kit.path.glob("step=*.ckpt")))
    assert steps == whole.global_step
    for step in range(1, steps):
        plugin = acdc(reset_momentum=reset_momentum)
        resumed = kit.fit(kit.Net(), plugin, ckpt_path=kit.path / f"step={step}.ckpt", **options)
        assert kit.difference(end, resumed.lightning_module.state_dict()) == 0.0, step
        assert plugin.dense_checkpoint.name == "acdc-dense.ckpt", step


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["OnExceptionCheckpoint", "save_on_exception"])
@pytest.mark.parametrize("first", [True, False])
def test_a_crash_checkpoint_has_the_masks(kit, error, how, first):
    if how == "OnExceptionCheckpoint":
        saves = OnExceptionCheckpoint(kit.path, "crash")
    else:
        saves = ModelCheckpoint(kit.path, "crash", save_on_exception=True, every_n_epochs=100)
    fails = Zeros(fail_at=(1, 0), error=error)
    callbacks = [saves, acdc(), fails] if first else [acdc(), fails, saves]
    with pytest.raises((error, SystemExit)):
        kit.fit(kit.Net(), *callbacks, max_epochs=4, enable_checkpointing=True)
    assert not _frozen
    [crash] = kit.path.rglob("*crash*.ckpt")
    watch = Zeros()
    kit.fit(kit.Net(), acdc(), watch, max_epochs=4, ckpt_path=crash)
    assert watch.seen[1]
    assert all(share >= 0.8 for share in watch.seen[1] + watch.seen[3])
    assert all(share < 0.5 for share in watch.seen[2])


def test_another_training_begins_without_masks(kit):
    plugin, watch = acdc(), Zeros(fail_at=(1, 0))
    with pytest.raises(RuntimeError, match="stop"):
        kit.fit(kit.Net(), plugin, watch, max_epochs=4)
    again = Zeros()
    kit.fit(kit.Net(), plugin, again, max_epochs=4)
    assert all(share < 0.5 for share in again.seen[0])


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"])
@pytest.mark.parametrize("first", [True, False])
def test_averages_of_weights_are_refused_before_training(kit, name, first):
    cls = getattr(pl.callbacks, name)
    averages = cls(swa_lrs=0.01) if name.startswith("Stochastic") else cls()
    callbacks = [averages, acdc()] if first else [acdc(), averages]
    watch = Zeros()
    with pytest.raises(PluginError, match=rf"{name} puts an average"):
        kit.fit(kit.Net(), *callbacks, watch, max_epochs=4)
    assert not watch.seen


def test_schedule_free_optimizers_are_refused(kit):
    class ScheduleFree(torch.optim.SGD):
        def train(self):
            pass

        def eval(self):
            pass

    class Module(kit.Net):
        def configure_optimizers(self):
            return ScheduleFree(self.parameters(), lr=0.1)

    with pytest.raises(PluginError, match="ScheduleFree evaluates an average"):
        kit.fit(Module(), acdc(), max_epochs=4)


def test_a_training_that_would_end_in_a_dense_phase_is_refused(kit):
    batches = len(kit.loader())
    for steps, good in [
        (batches, False),
        (batches + 1, True),
        (2 * batches, True),
        (2 * batches + 1, False),
        (99, True),
    ]:
        module = kit.Net()
        if good:
            kit.fit(module, acdc(), max_epochs=4, max_steps=steps)
            assert zeros(module) >= 0.8, steps
        else:
            with pytest.raises(PluginError, match=rf"max_steps={steps} ends .* in epoch \d, in a dense"):
                kit.fit(module, acdc(), max_epochs=4, max_steps=steps)
    with pytest.raises(PluginError, match="in a dense phase"):
        kit.fit(kit.Net(), acdc(), max_epochs=4, max_steps=-(-batches // 2) * 3, accumulate_grad_batches=2)


def test_a_training_that_is_stopped_in_a_dense_phase_ends_sparse(kit):
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    module = kit.Net()
    kit.fit(module, acdc(), Stops(), max_epochs=4)
    assert zeros(module) >= 0.8


def test_the_dense_checkpoint_is_still_known_after_a_resume_past_the_last_dense_phase(kit):
    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    save = ModelCheckpoint(kit.path, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    whole = kit.fit(kit.Net(), acdc(), save, max_epochs=4, enable_checkpointing=True, logger=logger)
    for path in kit.path.rglob("findings.json"):
        path.unlink()
    kit.fit(kit.Net(), acdc(), max_epochs=4, logger=logger, ckpt_path=kit.path / f"step={whole.global_step - 1}.ckpt")
    [page] = kit.path.rglob("findings.json")
    found = {finding.code: finding.value for finding in Report.read(page.parent).findings}
    assert found["dense_checkpoint"] == "acdc-dense.ckpt"


def test_provenance_counts_the_zeros_of_the_weights_that_are_saved(kit):
    trainer = kit.fit(kit.Net(), acdc(), max_epochs=4)
    trainer.save_checkpoint(kit.path / "sparse.ckpt")
    checkpoint = torch.load(kit.path / "sparse.ckpt", weights_only=True)
    [entry] = checkpoint["groundwire"]["plugins"]
    weights = [w for w in checkpoint["state_dict"].values() if w.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert entry["facts"]["sparsity"] == zeros >= 0.8
