"""FLEA in a Trainer: unmodified scripts, resume, reports, and what is refused."""

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, TensorDataset

from groundwire import Plugin, PluginError, Plugins, Report, hookimpl
from groundwire.checkpoint import plugins_in
from groundwire_flea import FLEA, FLEADataModule, FLEAWarning, SourceDatasets

pytestmark = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


class Net(pl.LightningModule):
    """A linear classifier whose step takes whatever its data set gives; it remembers the sources that it saw."""

    def __init__(self, inputs=5):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(inputs, 4)
        self.net = nn.Linear(4, 2)
        self.seen, self.steps = set(), None

    def forward(self, x):
        return self.net(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, y, *rest = batch.values() if isinstance(batch, dict) else batch
        meta = rest[0] if rest and isinstance(rest[0], dict) else {"source": rest[-1] if rest else []}
        self.seen.update(str(s.item() if hasattr(s, "item") else s) for s in meta["source"])
        return nn.functional.cross_entropy(self(x.float().flatten(1)), y)

    validation_step = test_step = training_step

    def configure_optimizers(self):
        self.steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 1e-3)


class Rows(Dataset):
    """Rows as (x, y, meta), or as dicts."""

    def __init__(self, data, as_dict=False):
        self.data, self.as_dict, self.clinics = data, as_dict, list(data.source)

    def __len__(self):
        return len(self.data.y)

    def __getitem__(self, i):
        d = self.data
        row = torch.tensor(d.X[i]), int(d.y[i]), {"groups": int(d.a[i]), "source": str(d.source[i])}
        return {"x": row[0], "y": row[1], **row[2]} if self.as_dict else row


def tensors(data):
    number = np.array([int(s[-1]) for s in data.source])
    return TensorDataset(*map(torch.tensor, (data.X, data.y, data.a, number)))


def fit(kit, dataset, flea, module=None, **options):
    module = module or Net()
    loader = dataset if isinstance(dataset, DataLoader) else DataLoader(dataset, 32, shuffle=True)
    trainer = kit.fit(module, *([flea] if isinstance(flea, pl.Callback) else flea), loader=loader, **options)
    return trainer, module


@pytest.fixture
def bad(table):
    return table(5, (1, 3))


GOOD = {"clinic 0", "clinic 2", "clinic 4"}


def test_rows_with_a_meta_dict_need_no_argument(kit, bad):
    flea = FLEA(permutations=0)
    trainer, module = fit(kit, Rows(bad), flea)
    assert module.seen == GOOD
    assert set(flea.decision.named(True)) == GOOD
    rows = sum(s in GOOD for s in bad.source)
    assert module.steps == trainer.num_training_batches == -(-rows // 32)


@pytest.mark.parametrize(
    ("arguments", "make"),
    [
        ({}, lambda d: Rows(d, as_dict=True)),
        ({"source": "source", "groups": "groups"}, Rows),
        ({"source": "clinics"}, Rows),
        ({"source": 3, "groups": 2}, tensors),
        ({"source": lambda batch: batch[3], "groups": lambda batch: batch[2]}, tensors),
    ],
    ids=["dicts", "keys", "attribute", "positions", "functions"],
)
def test_sources_and_groups_are_found_where_the_user_says(kit, bad, arguments, make):
    flea = FLEA(permutations=0, **arguments)
    _, module = fit(kit, make(bad), flea)
    assert {s[-1] for s in module.seen} == {"0", "2", "4"}


def test_a_list_of_sources_serves_a_data_set_that_does_not_know_them(kit, bad):
    dataset = TensorDataset(*map(torch.tensor, (bad.X, bad.y)))
    flea = FLEA(source=bad.source, groups=bad.a, permutations=0)
    trainer, _ = fit(kit, dataset, flea)
    assert len(trainer.train_dataloader.dataset) == sum(s in GOOD for s in bad.source)


@pytest.mark.parametrize("named", [True, False])
def test_the_parts_of_a_concatenation_are_sources(kit, bad, named):
    parts = {
        s: tensors(type(bad)(**{k: v[bad.source == s] for k, v in vars(bad).items()})) for s in sorted(set(bad.source))
    }
    dataset = SourceDatasets(parts) if named else ConcatDataset(parts.values())
    flea = FLEA(groups=2, permutations=0)
    fit(kit, dataset, flea)
    assert flea.decision.named(False) == (["clinic 1", "clinic 3"] if named else [1, 3])


def test_validation_and_test_rows_stay(kit, bad):
    module, flea = Net(), FLEA(permutations=0)
    trainer = kit.trainer(flea)
    loader = DataLoader(Rows(bad), 64)
    trainer.fit(module, DataLoader(Rows(bad), 64, shuffle=True), loader)
    assert module.seen == GOOD | {"clinic 1", "clinic 3"}
    assert len(trainer.val_dataloaders.dataset) == len(bad.y)
    trainer.test(module, loader, verbose=False)
    assert len(trainer.test_dataloaders.dataset) == len(bad.y)


def test_a_datamodule_and_the_modules_own_loader_are_filtered_too(kit, bad):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Rows(bad), 32, shuffle=True)

    module = Net()
    kit.trainer(FLEA(permutations=0)).fit(module, datamodule=Data())
    assert module.seen == GOOD
    own = type("Own", (Net,), {"train_dataloader": Data.train_dataloader})()
    kit.trainer(Plugins([FLEA(permutations=0)], report=False)).fit(own)
    assert own.seen == GOOD


def test_report_mode_trains_on_everything_and_weights_mode_draws_bad_sources_seldom(kit, bad):
    _, module = fit(kit, Rows(bad), FLEA(mode="report", permutations=0))
    assert len(module.seen) == 5
    flea = FLEA(mode="weights", permutations=0)
    trainer, _ = fit(kit, Rows(bad), flea)
    weights = trainer.train_dataloader.sampler.weights
    flipped = torch.tensor([s not in GOOD for s in bad.source])
    assert float(weights[flipped].max()) < 0.5 < float(weights[~flipped].min())


class Counting(FLEA):
    """Counts the comparisons."""

    name = "flea"
    compared = 0

    @property
    def deciding(self):
        deciding = super().deciding

        class Counted(type(deciding)):
            def _compared(this, *arguments):
                Counting.compared += 1
                return super()._compared(*arguments)

        return Counted(**vars(deciding))


def test_a_resumed_run_neither_compares_again_nor_changes_the_data(kit, bad):
    Counting.compared = 0
    path, first = kit.path / "resume.ckpt", Counting(permutations=0)
    trainer, _ = fit(kit, Rows(bad), first)
    trainer.save_checkpoint(path)
    second = Counting(n_clean=5, permutations=0)  # would keep everything
    module = Net()
    kit.trainer(second, max_epochs=2).fit(
        module, DataLoader(Rows(bad), 32, shuffle=True), ckpt_path=path, weights_only=True
    )
    assert Counting.compared == 1
    assert module.seen == GOOD
    assert second.decision == first.decision
    facts = plugins_in(torch.load(path, weights_only=True))[0]["facts"]
    assert set(facts["kept"]) == GOOD
    assert facts["sources"] == first.decision.hash


def test_a_resume_with_an_unseen_source_is_refused_and_with_other_rows_warned_about(kit, bad, table):
    path = kit.path / "resume.ckpt"
    trainer, _ = fit(kit, Rows(bad), FLEA(permutations=0))
    trainer.save_checkpoint(path)
    more = table(6, (1, 3))
    with pytest.raises(PluginError, match="'clinic 5'; it knows 'clinic 0'"):
        kit.trainer(FLEA(), max_epochs=2).fit(Net(), DataLoader(Rows(more), 32), ckpt_path=path, weights_only=True)
    fewer = type(bad)(**{k: v[:400] for k, v in vars(bad).items()})
    module = Net()
    with pytest.warns(FLEAWarning, match="not those of the checkpoint's decision"):
        kit.trainer(FLEA(), max_epochs=2).fit(module, DataLoader(Rows(fewer), 32), ckpt_path=path, weights_only=True)
    assert module.seen == GOOD


def test_another_fit_decides_anew(kit, bad, table):
    flea = FLEA(permutations=0)
    fit(kit, Rows(bad), flea)
    fit(kit, Rows(table(5, (0, 4))), flea)
    assert flea.decision.named(False) == ["clinic 0", "clinic 4"]


def test_reloading_loaders_every_epoch_compares_once(kit, bad):
    Counting.compared = 0
    fit(kit, Rows(bad), Counting(permutations=0), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert Counting.compared == 1


def test_the_comparison_moves_no_random_state(kit, bad):
    states = []
    for callbacks in ([], [FLEA(mode="report", permutations=2)]):
        torch.manual_seed(3)
        np.random.seed(3)
        _, module = fit(kit, Rows(bad), callbacks)
        states.append((module.state_dict(), torch.rand(1), np.random.rand()))
    assert kit.difference(states[0][0], states[1][0]) == 0
    assert states[0][1:] == states[1][1:]


def test_the_report_tells_who_was_suppressed_and_why(kit, bad):
    flea = FLEA(permutations=3)
    folder = kit.path / "report"
    fit(kit, Rows(bad), Plugins([flea], report_dir=folder))
    report = Report.read(folder)
    found = {f.code: f for f in report.findings}
    assert found["kept"].value == 3
    assert "not: clinic 1, clinic 3" in found["kept"].message
    assert set(found["scores"].value) == GOOD | {"clinic 1", "clinic 3"}
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "could not be drawn" not in page
    for text in ("which sources to trust", "p-value", "and only 3 are kept", "disb share"):
        assert text in page


def test_scores_reach_the_loggers_before_training(kit, bad):
    logger = pl.loggers.CSVLogger(kit.path, name="log", version="")
    fit(kit, Rows(bad), FLEA(permutations=0), logger=logger)
    text = (kit.path / "log" / "metrics.csv").read_text()
    assert "flea/q/clinic 1" in text
    assert "flea/kept" in text


# Beyond tables


class Images(Dataset):
    """Rows of a table hidden in images, so that only a projection of the pixels matters."""

    def __init__(self, data):
        torch.manual_seed(0)
        x = torch.tensor((data.X - data.X.mean(0)) / data.X.std(0)).float()
        self.pixels = (x[:, :4] @ torch.randn(4, 64)).view(-1, 1, 8, 8) + 0.1 * torch.randn(len(x), 1, 8, 8)
        self.rows = Rows(data)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return (self.pixels[i], *self.rows[i][1:])


@pytest.mark.parametrize(
    "embed", [None, "encoder", nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), lambda x: x.flatten(1)[:, :20]],
    ids=["pixels", "name", "module", "function"],
)  # fmt: skip
def test_images_are_embedded_and_reduced(kit, bad, embed):
    module = Net(64)
    module.encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))
    flea = FLEA(embed=embed, permutations=0)
    _, module = fit(kit, Images(bad), flea, module)
    assert flea.decision.named(False) == ["clinic 1", "clinic 3"]
    assert all(m.training for m in module.encoder)


def test_only_some_rows_of_large_sources_are_read_where_sources_are_known(kit, bad):
    read = []

    class Watched(Rows):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    flea = FLEA(source="clinics", max_rows_per_source=60, permutations=0)
    fit(kit, Watched(bad), flea, max_steps=0)
    assert len(set(read)) <= 5 * 60 + 1
    assert set(flea.decision.named(True)) == GOOD


# Refusals


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def no(text, kit, dataset, flea, **options):
    module = Net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(PluginError, match=text):
        fit(kit, dataset, flea, module, **options)
    assert kit.difference(before, module.state_dict()) == 0


def test_what_cannot_be_used_is_refused_before_training(kit, bad, table):
    data = Rows(bad)
    no(
        "groups is not in the training batches",
        kit,
        TensorDataset(*map(torch.tensor, (bad.X, bad.y))),
        FLEA(source=bad.source),
    )
    no("source='hospital' is not in the training batches", kit, data, FLEA(source="hospital"))
    no("source has 3 values, but the data set has 569 rows", kit, data, FLEA(source=["a", "b", "c"]))
    no("at least 3", kit, Rows(table(2)), FLEA())
    no("n_clean=9 is outside 1..5", kit, data, FLEA(n_clean=9))
    no("Endless cannot be read by number", kit, DataLoader(Endless(), 4), FLEA())
    no("embed='backbone' is no part of Net -> its children are: encoder, net", kit, data, FLEA(embed="backbone"))
    no(
        "cannot be chosen",
        kit,
        DataLoader(data, 32, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 569, 569)),
        FLEA(),
    )
    lonely = type(bad)(**vars(bad) | {"a": np.where(bad.source == "clinic 2", 0, bad.a)})
    no("source 'clinic 2' .* has no row of group 1", kit, Rows(lonely), FLEA())


def test_several_loaders_are_refused_with_the_way_out(kit, bad):
    module = Net()
    with pytest.raises(PluginError, match="SourceDatasets"):
        kit.trainer(FLEA()).fit(module, {"a": DataLoader(Rows(bad), 8), "b": DataLoader(Rows(bad), 8)})


@pytest.mark.parametrize("options", [{"fairness": "x"}, {"mode": "x"}, {"n_clean": 0}, {"n_clean": 2.0}])
def test_arguments_are_checked_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FLEA(**options)


# DataModule


def parts_by_source(data):
    names = sorted(set(data.source))
    return {s: tensors(type(data)(**{k: v[data.source == s] for k, v in vars(data).items()})) for s in names}


def test_a_flea_datamodule_filters_by_itself_and_resumes(kit, bad):
    def make():
        val = DataLoader(tensors(bad), 64)
        return FLEADataModule(parts_by_source(bad), FLEA(groups=2, permutations=0), val=val, loader={"batch_size": 16})

    data, module = make(), Net()
    trainer = kit.trainer()
    trainer.fit(module, datamodule=data)
    assert data.decision.named(False) == ["clinic 1", "clinic 3"]
    assert len(trainer.train_dataloader.dataset) == sum(s in GOOD for s in bad.source)
    assert trainer.train_dataloader.batch_size == 16
    assert len(trainer.val_dataloaders.dataset) == len(bad.y)
    trainer.save_checkpoint(kit.path / "dm.ckpt")
    again = make()
    again._deciding = type("Remembers", (type(data._deciding),), {"_compared": None})(**vars(data._deciding))
    kit.trainer(max_epochs=2).fit(Net(), datamodule=again, ckpt_path=kit.path / "dm.ckpt", weights_only=True)
    assert again.decision == data.decision


def test_a_flea_datamodule_around_a_datamodule_and_around_a_pair(kit, bad):
    class Inner(pl.LightningDataModule):
        stages = ()

        def setup(self, stage):
            self.stages = (*self.stages, stage)

        def train_dataloader(self):
            return DataLoader(Rows(bad), 32)

        def test_dataloader(self):
            return DataLoader(Rows(bad), 32)

    inner = Inner()
    data = FLEADataModule(inner, FLEA(permutations=0))
    module = Net()
    trainer = kit.trainer()
    trainer.fit(module, datamodule=data)
    assert module.seen == GOOD
    trainer.test(module, datamodule=data, verbose=False)
    assert inner.stages == ("fit", "test")
    pair = FLEADataModule(
        (TensorDataset(*map(torch.tensor, (bad.X, bad.y))), bad.source), FLEA(groups=bad.a, permutations=0)
    )
    assert len(pair.train_dataloader().dataset) == sum(s in GOOD for s in bad.source)
    with pytest.raises(PluginError, match="FLEADataModule: data is a list"):
        FLEADataModule([1, 2])


# With others


class Ids(Plugin):
    """Asks for the places of rows, for which core listens to the loader that FLEA replaced."""

    needs_ids = True

    def __init__(self):
        self.rows = set()

    @hookimpl
    def gw_backward_done(self, run):
        self.rows.update(run.ids)


def test_ids_of_other_plugins_are_places_in_the_kept_rows(kit, bad):
    ids = Ids()
    fit(kit, Rows(bad), [FLEA(permutations=0), ids])
    assert ids.rows == set(range(sum(s in GOOD for s in bad.source)))


def test_two_processes_train_on_the_rows_that_rank_0_chose(kit, bad):
    from lightning.pytorch.strategies import DDPStrategy

    class Write(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            (kit.path / f"rank{trainer.global_rank}.txt").write_text(",".join(sorted(pl_module.seen)))

    class OnRankZero(FLEA):
        name = "flea"

        @property
        def deciding(self):
            if torch.distributed.get_rank() != 0:
                assert self.seed == 0
            return super().deciding

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    fit(kit, Rows(bad), [OnRankZero(permutations=0), Write()], strategy=strategy, devices=2)
    for rank in (0, 1):
        assert set((kit.path / f"rank{rank}.txt").read_text().split(",")) == GOOD


def test_it_pickles_and_takes_no_data_into_copies(bad):
    import copy
    import pickle

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flea = pickle.loads(pickle.dumps(FLEA(source="clinic", groups="sex", n_clean=0.8)))
        assert copy.deepcopy(flea).source == "clinic"
        assert flea.decision is None
