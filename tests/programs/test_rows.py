"""Which rows a batch is made of, in the words of the data set that the user gave."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from groundwire import Plugin, PluginError, hookimpl
from groundwire_bias_audit import BiasAudit


class Numbered(TensorDataset):
    """Rows that know their own index, and what all rows have in common."""

    classes = ("none", "some")

    def __init__(self, rows=40):
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            torch.randn(rows, 8, generator=generator),
            torch.randint(0, 3, (rows,), generator=generator),
            torch.arange(rows),
        )
        self.names = [f"row {i}" for i in range(rows)]

    def describe(self, i):
        return f"{self.names[i]} of {len(self)}"


def net_of(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.order = []

        def training_step(self, batch, batch_idx):
            self.order.append(batch[2].tolist())
            return super().training_step(batch[:2], batch_idx)

    return Module()


class Keeps(Plugin):
    """Chooses rows, and compares the ids that core gives with those that the rows carry."""

    needs_ids = True

    def __init__(self, *calls, reload=False):
        self.calls, self.reload, self.ids, self.window = calls, reload, [], []

    @hookimpl
    def gw_train_data(self, data):
        for rows in self.calls:
            data.keep(rows)
        self.data = data

    def on_train_epoch_end(self, trainer, pl_module):
        if self.reload:
            self.data.reload()

    @hookimpl
    def gw_gradient(self, step, run):
        self.ids.append(list(run.ids))
        self.window.append([list(batch.ids) for batch in step.micro_batches])


ODD = list(range(1, 40, 2))
CARRIES = "item 9: a MicroBatch has no ids"


class NoWindow(Keeps):
    @hookimpl
    def gw_gradient(self, step, run):
        self.ids.append(list(run.ids))


@pytest.mark.parametrize(
    "plugin",
    [
        pytest.param(lambda: NoWindow(), id="all rows"),
        pytest.param(lambda: NoWindow(ODD), id="kept rows"),
        pytest.param(lambda: NoWindow(ODD, range(20)), id="kept twice"),
        pytest.param(lambda: NoWindow(ODD, reload=True), id="after a reload"),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_ids_are_rows_of_the_data_set_that_the_user_gave(kit, plugin, shuffle):
    module, plugin = net_of(kit), plugin()
    kit.fit(module, plugin, loader=DataLoader(Numbered(), 5, shuffle=shuffle), max_epochs=2)
    assert plugin.ids == module.order


def test_only_keep_is_undone_not_a_subset_of_the_users_own(kit):
    module, plugin = net_of(kit), NoWindow([0, 2, 4, 6])
    kit.fit(module, plugin, loader=DataLoader(Subset(Numbered(), list(range(30, 40))), 2, shuffle=True))
    assert [[30 + place for place in ids] for ids in plugin.ids] == module.order


@pytest.mark.xfail(strict=True, reason=CARRIES)
def test_each_batch_of_a_window_carries_its_own_ids(kit):
    module, plugin = net_of(kit), Keeps()
    kit.fit(module, plugin, loader=DataLoader(Numbered(), 4, shuffle=True), accumulate_grad_batches=3)
    assert [ids for window in plugin.window for ids in window] == module.order
    assert [len(window) for window in plugin.window] == [3, 3, 3, 1]


def test_scores_of_kept_rows_come_with_their_ids(kit):
    class Scores(NoWindow):
        score_stages = ("train",)

        @hookimpl
        def gw_scores(self, scores, fields, run):
            self.seen = [*getattr(self, "seen", []), (list(run.ids), fields.ids.tolist())]

    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch["x"], batch["y"]], batch_idx)

    def collate(rows):
        x, y, ids = (torch.stack(part) for part in zip(*rows, strict=True))
        return {"x": x, "y": y, "ids": ids}

    plugin = Scores(ODD)
    kit.fit(Module(), plugin, loader=DataLoader(Numbered(), 5, shuffle=True, collate_fn=collate))
    assert [ids for ids, _ in plugin.seen] == [ids for _, ids in plugin.seen]


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(
            lambda data: RandomSampler(data, generator=torch.Generator().manual_seed(5)),
            id="a sampler's own generator",
        ),
        pytest.param(lambda data: None, id="the loader's generator"),
    ],
)
def test_a_generator_of_the_users_gives_the_order_it_always_gave(kit, sampler):
    orders = []
    for plugins in ([], [NoWindow(range(40))]):
        module, data = net_of(kit), Numbered()
        made = sampler(data)
        options = (
            {"sampler": made} if made is not None else {"shuffle": True, "generator": torch.Generator().manual_seed(5)}
        )
        torch.manual_seed(0)
        kit.fit(module, *plugins, loader=DataLoader(data, 5, **options), max_epochs=2)
        orders.append(module.order)
    assert orders[0] == orders[1]


def test_a_weighted_sampler_is_refused(kit):
    sampler = WeightedRandomSampler([1.0] * 40, 40)
    with pytest.raises(PluginError, match="WeightedRandomSampler"):
        kit.fit(net_of(kit), NoWindow(ODD), loader=DataLoader(Numbered(), 5, sampler=sampler))


def test_the_data_sets_own_attributes_pass_through(kit):
    class Reads(kit.Net):
        def on_train_epoch_start(self):
            data = self.trainer.train_dataloader.dataset
            self.seen = data.classes, data.names[0], data.describe(1), len(data)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    module = Reads()
    kit.fit(module, NoWindow(ODD), loader=DataLoader(Numbered(), 5))
    assert module.seen == (("none", "some"), "row 0", "row 1 of 40", 20)


def test_no_loader_is_asked_for_without_training_batches(kit):
    asked = []

    class Module(kit.Net):
        def train_dataloader(self):
            asked.append(1)
            return kit.loader()

    counts = []
    for plugins in ([], [NoWindow(range(40))]):
        asked.clear()
        kit.trainer(*plugins, limit_train_batches=0).fit(Module())
        counts.append(len(asked))
    assert counts[0] == counts[1]


class Batched(Dataset):
    """Gives several rows at once and none alone, as data sets on servers do."""

    def __init__(self, kit):
        self.data = kit.data()

    def __len__(self):
        return len(self.data)

    def __getitems__(self, places):
        return [(*self.data[i], {"groups": i % 2}) for i in places]


@pytest.mark.xfail(strict=True, reason="item 12: Samples asks such a data set for single rows by []")
def test_a_data_set_that_gives_several_rows_at_once_is_audited(kit):
    class Module(kit.Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch[:2], batch_idx)

    audit = BiasAudit(variants=[0.5])
    kit.fit(Module(), audit, val=DataLoader(Batched(kit), 8))
    assert audit.results["validate"]["0.5"].to_frame().shape[0] == 2
