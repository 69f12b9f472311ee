"""A second pass leaves no trace: same weights, data order, random states and logs as without a plugin."""

import csv
import random
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from core_replaying_twice import Twice, both
from torch import nn

from groundwire import Plugin, hookimpl


def test_dropout_changes_neither_weights_nor_data_order(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net.insert(3, nn.Dropout(0.5))
            self.order = []

        def on_train_batch_start(self, batch, batch_idx):
            self.order.append(batch[0].sum().item())

    (plain, _), (ours, _) = both(kit, Module)
    assert plain.order == ours.order
    assert kit.difference(plain.state_dict(), ours.state_dict()) == 0.0


def test_replays_draw_fresh_masks_and_same_rng_the_first_ones(kit):
    found = []

    class Look(Plugin):
        @hookimpl
        def gw_gradient(self, step):
            first = step.grads["0.weight"] if "0.weight" in step.grads else step.grads["net.0.weight"]
            fresh, same = step.replay()["net.0.weight"], step.replay(same_rng=True)["net.0.weight"]
            again = step.replay()["net.0.weight"]
            found.append((torch.equal(first, same), torch.equal(first, fresh), torch.equal(fresh, again)))

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))

    kit.fit(Module(), Look())
    assert set(found) == {(True, False, True)}


def test_random_states_of_numpy_and_python_are_as_before(kit):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            self.drawn = (random.random(), np.random.rand(), torch.rand(1).item())
            return super().training_step(batch, batch_idx)

    (plain, _), (ours, _) = both(kit, Module)
    assert plain.drawn == ours.drawn


def test_logs_are_the_same_line_by_line(kit):
    def rows(callbacks, name):
        logger = pl.loggers.CSVLogger(kit.path / name, name="", version="")
        second = pl.loggers.TensorBoardLogger(kit.path / name, name="tb")

        class Module(kit.Net):
            def training_step(self, batch, batch_idx):
                self.logger.log_metrics({"direct": batch_idx}, step=self.global_step)
                for each in self.loggers:
                    each.log_metrics({"each": 1.0}, step=self.global_step)
                return super().training_step(batch, batch_idx)

        options = {"logger": [logger, second], "log_every_n_steps": 1, "max_epochs": 2}
        kit.fit(Module(), *callbacks, val=kit.loader(), **options)
        with open(logger.experiment.metrics_file_path) as file:
            return list(csv.DictReader(file))

    assert rows([], "without") == rows([Twice()], "with")


def test_spectral_norm_vectors_do_not_advance(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.utils.parametrizations.spectral_norm(self.net[0])

    (plain, _), (ours, _) = both(kit, Module)
    assert kit.difference(plain.state_dict(), ours.state_dict()) == 0.0


@pytest.mark.slow
def test_core_imports_no_plugin():
    code = (
        "import groundwire.host, sys; [getattr(groundwire, n) for n in groundwire.__all__]; "
        "[groundwire.host.service_class(path) for path in groundwire.host.SERVICES]; print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "groundwire.host" in modules
    assert not [name for name in modules if name.startswith("groundwire_")]


def test_a_logger_in_a_replay_keeps_its_class_folder_and_chains(kit):
    seen = []

    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            self.logger.experiment.config.update({"a": 1})
            seen.append((isinstance(self.logger, Logger), self.logger.save_dir, self.trainer.log_dir, self.logger.name))
            return super().training_step(batch, batch_idx)

    class Nothing:
        def __getattr__(self, name):
            return self

        def __call__(self, *args):
            return self

    class Logger(pl.loggers.CSVLogger):
        @property
        def experiment(self):
            return Nothing()

        def log_metrics(self, metrics, step=None):
            pass

        def save(self):
            pass

    kit.fit(Module(), Twice(), logger=Logger(kit.path), max_steps=2)
    assert len(seen) == 4
    assert len(set(seen)) == 1
