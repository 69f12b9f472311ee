"""FLEA in a Trainer: unmodified scripts, resume, reports, and what is refused."""

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from flea_clinics_of_tests import GOOD, Net, Rows, fit, tensors
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset, random_split

from groundwire import Plugin, Plugins, Report, hookimpl
from groundwire_flea import FLEA, SourceDatasets
from groundwire_flea.report import distances_figure, scores_figure, section

pytestmark = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


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


def test_a_subset_of_named_parts_knows_their_names(kit, bad):
    parts = {
        s: tensors(type(bad)(**{k: v[bad.source == s] for k, v in vars(bad).items()})) for s in sorted(set(bad.source))
    }
    some, _ = random_split(SourceDatasets(parts), [0.9, 0.1], torch.Generator().manual_seed(0))
    flea = FLEA(groups=2, permutations=0)
    fit(kit, some, flea)
    assert set(flea.decision.named(True)) == GOOD


def test_what_rows_say_counts_more_than_an_unnamed_part(kit, bad):
    half = len(bad.y) // 2
    years = [Rows(type(bad)(**{k: v[part] for k, v in vars(bad).items()})) for part in (slice(half), slice(half, None))]
    flea = FLEA(permutations=0)
    fit(kit, ConcatDataset(years), flea)
    assert set(flea.decision.named(True)) == GOOD


class TwoAttributes(Rows):
    def __getitem__(self, i):
        x, y, meta = super().__getitem__(i)
        return x, y, {**meta, "groups": {"sex": meta["groups"], "old": int(x[0] > 13)}}


def test_groups_of_several_attributes_are_intersected_and_one_can_be_named(kit, bad):
    both, one, plain = (FLEA(permutations=0, **options) for options in ({}, {"groups": "sex"}, {}))
    fit(kit, TwoAttributes(bad), both)
    fit(kit, TwoAttributes(bad), one)
    fit(kit, Rows(bad), plain)
    assert {"P(a=0, 0)", "P(a=0, 1)", "P(a=1, 0)", "P(a=1, 1)"} <= set(both.decision.columns)
    assert one.decision == plain.decision


def test_a_number_of_sources_may_be_numpys(kit, bad):
    flea = FLEA(n_clean=np.int64(4), permutations=0)
    fit(kit, Rows(bad), flea)
    assert len(flea.decision.named(True)) == 4


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


def test_the_comparison_moves_no_random_state(kit, bad):
    class Augmented(Rows):
        def __getitem__(self, i):
            x, *rest = super().__getitem__(i)
            return x + 0.1 * torch.randn(x.shape) * np.random.rand(), *rest

    states = []
    for callbacks in ([], [FLEA(mode="report", permutations=2)]):
        torch.manual_seed(3)
        np.random.seed(3)
        _, module = fit(kit, Augmented(bad), callbacks)
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


def test_tables_on_the_page_have_units_and_few_enough_columns_to_be_seen(kit, bad):
    flea = FLEA(permutations=0)
    many = type(bad)(**vars(bad) | {"a": np.arange(len(bad.y)) % 9})
    fit(kit, Rows(many), flea)
    parts = section(flea.decision, "filter").tables
    assert {name for part in parts for name in part.columns} == {"source", *flea.decision.columns}
    assert all(len(part.columns) <= 7 for part in parts)
    assert all(len(row) == len(part.columns) for part in parts for row in part.rows)
    for part in parts:
        assert "from 0 to" in part.caption
    assert len({part.caption for part in parts}) == len(parts)
    for figure in (scores_figure(flea.decision), distances_figure(flea.decision)):
        assert any("no unit" in text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel()))


def test_numbers_on_the_map_of_distances_can_be_read_and_the_legend_covers_no_bar(kit, bad):
    flea = FLEA(permutations=0)
    fit(kit, Rows(bad), flea)
    heat = distances_figure(flea.decision).axes[0]
    for text in heat.texts:
        j, i = map(round, text.get_position())
        red, green, blue, _ = heat.images[0].to_rgba(heat.images[0].get_array())[i, j]
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.4
        assert text.get_color() == ("white" if dark else "black")
    bars = scores_figure(flea.decision)
    bars.draw_without_rendering()
    [legend] = bars.legends
    assert not legend.get_window_extent().overlaps(bars.axes[0].get_window_extent())


def test_scores_reach_the_loggers_before_training(kit, bad):
    logger = pl.loggers.CSVLogger(kit.path, name="log", version="")
    fit(kit, Rows(bad), FLEA(permutations=0), logger=logger)
    text = (kit.path / "log" / "metrics.csv").read_text()
    assert "flea/q/clinic 1" in text
    assert "flea/kept" in text


class Ids(Plugin):
    """Asks for the places of rows, for which core listens to the loader that FLEA replaced."""

    needs_ids = True

    def __init__(self):
        self.rows = set()

    @hookimpl
    def gw_backward_done(self, run):
        self.rows.update(run.ids)


def test_ids_of_other_plugins_are_rows_of_the_users_data_set(kit, bad):
    ids = Ids()
    fit(kit, Rows(bad), [FLEA(permutations=0), ids])
    assert ids.rows == {row for row, source in enumerate(bad.source) if source in GOOD}


@pytest.mark.ddp
def test_two_processes_train_on_the_rows_that_rank_0_chose(kit, bad):
    from lightning.pytorch.strategies import DDPStrategy

    class Write(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            (kit.path / f"rank{trainer.global_rank}.txt").write_text(",".join(sorted(pl_module.seen)))

    class OnRankZero(FLEA):
        name = "flea"

        @property
        def loader_filter(self):
            if torch.distributed.get_rank() != 0:
                assert self.seed == 0
            return super().loader_filter

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
