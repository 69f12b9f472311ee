"""``run.evaluate`` and replays are not seen: the run goes on as if nobody had asked, and they see what it saw."""

import contextlib
import random
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from programs_harness import Evaluates, Replay
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset

from groundwire import Plugin, PluginError, hookimpl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument.*"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`.*"),
]


class Shuffled(Sampler):
    """A sampler with a random state of its own and a count of its epochs."""

    def __init__(self, rows):
        self.rows, self.random, self.epoch = rows, random.Random(5), 0

    def __len__(self):
        return self.rows

    def __iter__(self):
        self.epoch += 1
        order = list(range(self.rows))
        self.random.shuffle(order)
        yield from order[self.epoch :] + order[: self.epoch]


def numbered(rows=40):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)
    return TensorDataset(x, y, torch.arange(rows))


def seen_by(kit, loader, *plugins, limit=1.0):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.rows = []

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

        def validation_step(self, batch, batch_idx):
            self.rows.append(batch[2].tolist())
            super().validation_step(batch[:2], batch_idx)

    module = Module()
    options = {"max_epochs": 3, "limit_val_batches": limit, "num_sanity_val_steps": 0}
    trainer = kit.fit(module, *plugins, val=loader, **options)
    return module.rows, {name: float(value) for name, value in trainer.callback_metrics.items()}


def generator():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "a loader's generator": lambda data: DataLoader(data, 8, shuffle=True, generator=generator()),
    "a sampler's generator": lambda data: DataLoader(data, 8, sampler=RandomSampler(data, generator=generator())),
    "a sampler of the user's own": lambda data: DataLoader(data, 8, sampler=Shuffled(len(data))),
}


@pytest.mark.parametrize("limit", [1.0, 2], ids=["whole epochs", "limit_val_batches"])
@pytest.mark.parametrize("which", LOADERS)
def test_the_same_rows_are_validated_afterwards(kit, which, limit):
    plain = seen_by(kit, LOADERS[which](numbered()), limit=limit)
    assert seen_by(kit, LOADERS[which](numbered()), Evaluates(), limit=limit) == plain


def test_so_they_are_of_a_loader_that_draws_from_the_global_state(kit):
    plain = seen_by(kit, DataLoader(numbered(), 8, shuffle=True), limit=2)
    assert seen_by(kit, DataLoader(numbered(), 8, shuffle=True), Evaluates(), limit=2) == plain


def class_level(kit):
    class Module(kit.Net):
        outputs = []
        counts = {"validated": 0}
        trained = []

        def training_step(self, batch, batch_idx):
            self.trained.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.outputs.append(len(batch[0]))
            self.counts["validated"] += 1

        def on_validation_epoch_end(self):
            self.log("rows", float(sum(self.outputs)))
            self.outputs.clear()

    return Module()


@pytest.mark.parametrize("plugin", [Evaluates, Replay])
def test_lists_and_dicts_of_the_class_are_put_back(kit, plugin):
    module = class_level(kit)
    trainer = kit.fit(module, plugin(), val=kit.loader(), num_sanity_val_steps=0)
    found = float(trainer.callback_metrics["rows"]), module.counts["validated"], module.trained
    assert found == (40, 5, [0, 1, 2, 3, 4])


def logged_and_evaluated(kit, module, val, **options):
    """What Lightning logged in the last validation, and what one more pass gave."""
    plugin = Evaluates()
    trainer = kit.fit(module, plugin, val=val, num_sanity_val_steps=0, **options)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    return logged, plugin.found[-1].metrics


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_names_of_a_combined_loader_are_those_that_lightning_gives(kit, mode):
    class Module(kit.Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            batches = batch.values() if isinstance(batch, dict) else [batch]
            self.log("val_rows", float(sum(len(b[0]) for b in batches if b is not None)), batch_size=1)

    loaders = {"a": DataLoader(kit.data(), 8), "b": DataLoader(kit.data(16), 8)}
    logged, evaluated = logged_and_evaluated(kit, Module(), CombinedLoader(loaders, mode))
    assert evaluated == pytest.approx(logged)


@pytest.mark.parametrize(
    "rule",
    [min, max, sum, "min", "max", "sum", "mean", torch.min, torch.mean],
    ids=lambda rule: rule if isinstance(rule, str) else f"{rule.__module__ or 'torch'}.{rule.__name__}",
)
def test_values_are_reduced_as_lightning_reduces_them(kit, rule):
    class Module(kit.Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_x", float(batch_idx + 1), reduce_fx=rule, batch_size=1)

    logged, evaluated = logged_and_evaluated(kit, Module(), kit.loader())
    assert evaluated == logged


class Iterates:
    def validation_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))


def test_a_validation_step_that_takes_the_iterator_works_or_is_refused(kit):
    class Module(Iterates, kit.Net):
        pass

    with contextlib.suppress(PluginError):
        logged, evaluated = logged_and_evaluated(kit, Module(), kit.loader())
        assert evaluated == logged


class Weighs:
    """The loss is weighted by a metric of the last step, as adaptive curricula do."""

    def training_step(self, batch, batch_idx):
        last = self.trainer.callback_metrics.get("train_weight", torch.tensor(1.0))
        loss = super().training_step(batch, batch_idx)
        self.log("train_weight", 0.5 + 0.5 * loss.detach())
        return last * loss


def test_a_replay_sees_the_metrics_that_the_step_saw(kit):
    class Module(Weighs, kit.Net):
        pass

    states = []
    for plugins in ([], [Replay()]):
        module = Module()
        kit.fit(module, *plugins)
        states.append(module.state_dict())
    assert kit.difference(*states) == 0.0


class Skips:
    """The first batches are skipped without running the model, as warm-up of a data queue."""

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 0 and batch_idx < 2:
            return None
        return super().training_step(batch, batch_idx)


class TrainingScores(Plugin):
    score_stages = ("train",)

    def __init__(self):
        self.shapes = []

    @hookimpl
    def gw_scores(self, scores):
        self.shapes.append(tuple(scores.shape))


def test_a_first_batch_that_is_skipped_has_no_scores(kit):
    class Module(Skips, kit.Net):
        pass

    plugin = TrainingScores()
    kit.fit(Module(), plugin)
    assert plugin.shapes == [(8, 3)] * 3


def test_a_later_batch_that_is_skipped_has_none_either(kit):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    plugin = TrainingScores()
    kit.fit(Module(), plugin)
    assert plugin.shapes == [(8, 3)] * 4


class Learner:
    def __init__(self):
        super().__init__()
        self.lr = 0.1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_a_gradient_owner_takes_part_in_the_search_for_a_learning_rate_or_the_run_warns(kit):
    class Module(Learner, kit.Net):
        pass

    plugin, finder = Replay(), pl.callbacks.LearningRateFinder(num_training_steps=8, update_attr=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kit.fit(Module(), plugin, finder)
    warned = any("replay" in str(w.message) and "LearningRateFinder" in str(w.message) for w in caught)
    assert warned or plugin.replays == 8 + 5
