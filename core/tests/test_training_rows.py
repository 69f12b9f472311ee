"""Dataset indices of a batch, and choosing the rows to train on."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from groundwire import Plugin, PluginError, TrainData, hookimpl


class Ids(Plugin):
    needs_ids = True
    score_stages = ("train", "validate")

    def __init__(self):
        self.seen = []

    @hookimpl
    def gw_scores(self, fields, stage, run):
        self.seen.append((stage, run.ids, fields.inputs[:, 0].tolist()))


@pytest.mark.parametrize("workers", [0, 2])
def test_ids_are_the_dataset_indices_of_the_batch(kit, workers):
    x = torch.arange(20.0)[:, None].expand(-1, 8).contiguous()
    dataset = TensorDataset(x, torch.zeros(20, dtype=torch.long))
    plugin = Ids()
    train = DataLoader(dataset, 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    sampler = train.batch_sampler
    val = DataLoader(dataset, 3)

    class Module(kit.Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    kit.fit(Module(), plugin, loader=train, val=[val, val], max_epochs=2, limit_val_batches=3)
    assert len(plugin.seen) == 2 * (5 + 6)
    assert all(ids == values for _, ids, values in plugin.seen)
    assert train.batch_sampler is sampler


def test_an_iterable_dataset_has_no_ids(kit):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(kit.data())

    plugin = Ids()
    kit.fit(kit.Net(), plugin, loader=DataLoader(Stream(), 8))
    assert {ids for _, ids, _ in plugin.seen} == {None}


class Keep(Plugin):
    name = "keep"

    def __init__(self, act):
        self.act, self.rows, self.calls = act, [], 0

    @hookimpl
    def gw_train_data(self, data):
        self.calls += 1
        self.act(data)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows += batch[0][:, 0].tolist()


def numbered(kit):
    x = torch.arange(40.0)[:, None].expand(-1, 8).contiguous()
    return TensorDataset(x, torch.zeros(40, dtype=torch.long))


@pytest.mark.parametrize("place", ["argument", "module", "datamodule"])
def test_kept_rows_are_the_only_ones_trained_on(kit, place):
    import lightning.pytorch as pl

    class Module(kit.Net):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    def train_dataloader(self):
        return DataLoader(numbered(kit), 4, shuffle=True)

    plugin, options = Keep(lambda data: data.keep(range(10, 22))), {}
    module = (type("M", (Module,), {"train_dataloader": train_dataloader}) if place == "module" else Module)()
    if place == "datamodule":
        options["datamodule"] = type("D", (pl.LightningDataModule,), {"train_dataloader": train_dataloader})()
    if place == "argument":
        options["train_dataloaders"] = DataLoader(numbered(kit), 4, shuffle=True)
    trainer = kit.trainer(plugin, max_epochs=2)
    trainer.fit(module, **options)
    assert sorted(plugin.rows) == sorted(list(range(10, 22)) * 2)
    assert plugin.rows[:12] != sorted(plugin.rows[:12])
    assert module.steps == 6
    assert plugin.calls == 1


def test_reload_asks_again_at_the_next_epoch(kit):
    plugin = Keep(lambda data: (data.keep(range(plugin.calls * 4)), data.reload()))
    kit.fit(kit.Net(), plugin, loader=DataLoader(numbered(kit), 4), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert plugin.rows == [*range(4), *range(8), *range(12)]


def test_weights_choose_rows_in_proportion(kit):
    plugin = Keep(lambda data: data.weights([0.0] * 30 + [1.0] * 10))
    kit.fit(kit.Net(), plugin, loader=DataLoader(numbered(kit), 4, shuffle=True))
    assert len(plugin.rows) == 40
    assert min(plugin.rows) >= 30


def test_keeping_and_weighting_compose():
    data = TrainData(DataLoader(TensorDataset(torch.arange(10.0)), 2))
    data.weights([1.0] * 5 + [0.0] * 5)
    data.keep([4, 5, 6])
    assert {float(v) for (batch,) in data.result() for v in batch} == {4.0}


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda d: d.keep([40]), "index 40 is outside the data set of 40 rows"),
        (lambda d: d.keep([]), "no training row would remain"),
        (lambda d: d.weights([1.0]), r"\(1,\) given for a data set of 40 rows"),
        (lambda d: d.weights([-1.0] + [1.0] * 39), "not negative"),
    ],
)
def test_impossible_choices_are_refused(kit, act, text):
    with pytest.raises(PluginError, match=text):
        kit.fit(kit.Net(), Keep(act), loader=DataLoader(numbered(kit), 4))


def test_a_sampler_of_the_users_own_is_refused(kit):
    loader = DataLoader(numbered(kit), 4, sampler=[3, 1, 2])
    with pytest.raises(PluginError, match="cannot be chosen"):
        kit.fit(kit.Net(), Keep(lambda d: d.keep([1])), loader=loader)


def test_a_loader_nobody_changes_is_the_users_own(kit):
    loader = DataLoader(numbered(kit), 4, sampler=[3, 1, 2])
    plugin = Keep(lambda data: None)
    trainer = kit.trainer(plugin)
    trainer.fit(kit.Net(), loader)
    assert plugin.rows == [3, 1, 2]


def test_custom_datasets_are_kept_by_subset(kit):
    class Rows(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return torch.full((8,), float(i)), 0

    plugin = Keep(lambda data: data.keep([5, 0]))
    kit.fit(kit.Net(), plugin, loader=DataLoader(Rows(), 2))
    assert plugin.rows == [5, 0]


def test_reload_in_the_middle_of_an_epoch_waits_for_the_next(kit):
    class Middle(Keep):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.data.reload()
            assert trainer.train_dataloader is not None

    def act(data):
        plugin.data = data
        data.keep(range(plugin.calls * 12))

    plugin = Middle(act)
    kit.fit(kit.Net(), plugin, loader=DataLoader(numbered(kit), 4), max_epochs=2)
    assert plugin.rows == [*range(12), *range(24)]


@pytest.mark.parametrize("sampler", ["replacement", "batch_sampler"])
def test_samplers_that_are_not_plain_are_refused(kit, sampler):
    from torch.utils.data import BatchSampler, RandomSampler

    rows = numbered(kit)
    if sampler == "replacement":
        loader = DataLoader(rows, 4, sampler=RandomSampler(rows, replacement=True, num_samples=100))
    else:
        loader = DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 4, False))
    with pytest.raises(PluginError, match="cannot be chosen"):
        kit.fit(kit.Net(), Keep(lambda d: d.keep([1])), loader=loader)
