"""AC/DC and frozen masks: zeros stay while they should, and go free when they should."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groundwire import PluginError, Report
from groundwire_cram import ACDC, CrAM, freeze_masks, prune
from groundwire_cram.acdc import schedule
from groundwire_cram.masks import _frozen, pack, unpack


def zeros(module):
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_the_default_schedule_is_the_published_one():
    phases = schedule(100)
    starts = [epoch for epoch in range(1, 100) if phases[epoch] and not phases[epoch - 1]]
    ends = [epoch for epoch in range(1, 100) if not phases[epoch] and phases[epoch - 1]]
    assert starts == [10, 20, 30, 40, 50, 60, 70, 85]
    assert ends == [15, 25, 35, 45, 55, 65, 75]


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="5 epochs are too few"):
        schedule(5, warmup=3, final_dense=2, final_sparse=2)
    with pytest.raises(ValueError, match="phase must be a whole number"):
        schedule(10, phase=0)


class Watch(ACDC):
    """Notes the share of zeros after each batch, by epoch."""

    def __init__(self, **options):
        super().__init__(0.8, warmup=1, phase=1, final_dense=1, final_sparse=1, **options)
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, set()).add(round(zeros(pl_module), 2))


def test_weights_are_zero_in_compressed_epochs_and_free_in_dense_ones(kit):
    watch = Watch()
    trainer = kit.fit(kit.Net(), watch, max_epochs=4)
    assert watch._phases == [False, True, False, True]
    assert all(share >= 0.8 for share in watch.seen[1] | watch.seen[3])
    assert all(share < 0.5 for share in watch.seen[0] | watch.seen[2])
    assert zeros(trainer.lightning_module) >= 0.8
    assert not _frozen


def test_the_dense_model_of_the_pair_is_written_when_the_last_dense_phase_ends(kit):
    watch = Watch()
    module = kit.Net()
    kit.fit(module, watch, max_epochs=4)
    dense = torch.load(watch.dense_checkpoint, weights_only=True)["state_dict"]
    twin = kit.Net()
    twin.load_state_dict(dense)
    assert zeros(twin) < 0.5
    found = {f.code: f.value for f in Report.read(watch.dense_checkpoint.parent).findings}
    assert found["dense_checkpoint"] == "acdc-dense.ckpt"
    assert found["sparsity"] == pytest.approx(zeros(module))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resume_between_any_phases_is_bit_identical(kit, stop):
    def acdc():
        return ACDC(0.8, warmup=1, phase=2, final_dense=1, final_sparse=1)

    whole = kit.fit(kit.Net(), acdc(), max_epochs=5)

    class Save(ACDC):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch + 1 == stop:
                trainer.save_checkpoint(kit.path / "stop.ckpt")

    saving = Save(0.8, warmup=1, phase=2, final_dense=1, final_sparse=1)
    saving.name = "acdc"
    kit.fit(kit.Net(), saving, max_epochs=5)
    checkpoint = torch.load(kit.path / "stop.ckpt", weights_only=True)
    state = checkpoint["callbacks"]
    resumed_plugin = acdc()
    if state:  # the saving class has another name, and so another key
        checkpoint["callbacks"] = {resumed_plugin.state_key: next(iter(state.values()))}
        torch.save(checkpoint, kit.path / "stop.ckpt")
    resumed = kit.fit(kit.Net(), resumed_plugin, max_epochs=5, ckpt_path=kit.path / "stop.ckpt")
    assert kit.difference(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict()) == 0.0


def test_momentum_is_forgotten_when_a_dense_phase_begins(kit):
    norms = {}

    class See(Watch):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            states = trainer.optimizers[0].state.values()
            norms[trainer.current_epoch] = sum(float(s["momentum_buffer"].norm()) for s in states)

    kit.fit(kit.Net(), See(reset_momentum=True), max_epochs=4)
    assert norms[2] == 0
    assert norms[1] > 0
    assert norms[3] > 0


def test_what_acdc_cannot_do_is_said_before_training(kit):
    with pytest.raises(PluginError, match="2 epochs are too few"):
        kit.fit(kit.Net(), ACDC(), max_epochs=2)
    with pytest.raises(PluginError, match="set max_epochs"):
        kit.fit(kit.Net(), ACDC(), max_epochs=-1, max_steps=3)
    with pytest.raises(PluginError, match="names no prunable"):
        kit.fit(kit.Net(), ACDC(skip="backbone"), max_epochs=4)
    with pytest.raises(ValueError, match="of one kind"):
        ACDC(pattern="n:m mix")


def test_an_exception_in_a_compressed_phase_lets_the_zeros_go(kit):
    class Fails(Watch):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.current_epoch == 1:
                assert _frozen
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        kit.fit(kit.Net(), Fails(), max_epochs=4)
    assert not _frozen


@pytest.mark.parametrize("with_cram", [False, True])
def test_frozen_zeros_survive_fine_tuning_with_momentum_of_before(kit, with_cram):
    module = kit.Net()
    kit.fit(module, max_epochs=1)
    prune(module, 0.8, inplace=True)
    with freeze_masks(module) as frozen:
        kit.fit(module, *([CrAM(0.5)] if with_cram else []), max_epochs=1)
        for name, mask in frozen.masks.items():
            assert not dict(module.named_parameters())[name][~mask].any()
    assert not _frozen
    kit.fit(module, max_epochs=1)
    assert zeros(module) < 0.5


def test_frozen_zeros_count_neither_in_gradients_nor_for_other_layers():
    layer = prune(nn.Linear(8, 4), 0.5)
    other = nn.Linear(8, 4)
    optimizer = torch.optim.SGD([*layer.parameters(), *other.parameters()], lr=0.1, weight_decay=0.1)
    frozen = freeze_masks(layer)
    (layer(torch.ones(2, 8)) + other(torch.ones(2, 8))).sum().backward()
    assert not layer.weight.grad[layer.weight == 0].any()
    optimizer.step()
    assert int((layer.weight == 0).sum()) == 16
    assert (other.weight != 0).all()
    frozen.remove()
    layer(torch.ones(2, 8)).sum().backward()
    assert layer.weight.grad.all()


def test_a_model_without_zeros_or_a_skipped_one_is_refused():
    with pytest.raises(ValueError, match="has a zero to keep"):
        freeze_masks(nn.Linear(8, 4))
    net = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), 0.5, "layerwise")
    assert list(freeze_masks(net, skip="1").masks) == ["0.weight"]


def test_a_parameter_that_dies_takes_its_mask_along():
    layer = prune(nn.Linear(8, 4), 0.5)
    frozen = freeze_masks(layer)
    assert _frozen
    del layer, frozen
    assert not _frozen


@given(st.lists(st.booleans(), max_size=40))
def test_a_packed_mask_comes_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool).reshape(1, -1)
    packed = pickle.loads(pickle.dumps(pack(mask)))
    assert torch.equal(unpack(packed), mask)


SPAWNING = """
import lightning.pytorch as pl, torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from groundwire_cram import freeze_masks, prune


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 8)), 4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    torch.manual_seed(0)
    module = Net()
    prune(module.net, 0.5, "layerwise", inplace=True)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    freeze_masks(module.net)
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=2, logger=False,
               enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(module)
    for name, old in before.items():
        new = dict(module.named_parameters())[name]
        assert not torch.equal(new, old), name
        if old.dim() > 1:
            assert not new[old == 0].any(), name
"""


@pytest.mark.ddp
def test_zeros_stay_frozen_in_spawned_processes(tmp_path):
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_copies_and_pickles_of_a_frozen_module_are_free(tmp_path):
    layer = prune(nn.Linear(8, 4), 0.5)
    with freeze_masks(layer):
        count = len(_frozen)
        torch.save(layer, tmp_path / "layer.pt")
        twins = [copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)]
        assert len(_frozen) == count
        for twin in twins:
            optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
            twin(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            assert twin.weight.all()
            with freeze_masks(prune(twin, 0.5, inplace=True)):
                assert len(_frozen) == count + 1
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not _frozen
