"""Two processes: the same counts, the same lists and the same samples as one."""

import re

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from bias_audit_patients import Classifier, Patients
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from groundwire import Report
from groundwire_bias_audit import BiasAudit

pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")


class Pictures(Patients):
    """The 30 measurements as pictures of 5 x 6; 569 rows, so that two processes repeat one."""

    def __init__(self):
        super().__init__(form="plain")
        self.x = ((self.x * 8).round() / 8).reshape(-1, 1, 5, 6)


class Exact(Classifier):
    """Sums that have no rounding, so that scores do not depend on how rows are dealt into batches."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(30, 1))
        with torch.no_grad():
            self.net[1].weight.copy_((self.net[1].weight * 64).round() / 16)
            self.net[1].bias.zero_()

    def validation_step(self, batch, batch_idx):
        self.loss(batch)


class Dumping(BiasAudit):
    """What the first process knows, on disk: the parent of forked processes knows nothing."""

    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            found = {
                name: (r.counts.histogram.counts, r.counts.histogram.mass, r.comparison and r.comparison.pairs)
                for name, r in self.results["validate"].items()
            }
            torch.save(found, f"{trainer.default_root_dir}/found.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder, counts and report of the same validation by one process and by two."""
    folder = tmp_path_factory.mktemp("null")
    other = Exact()
    with torch.no_grad():
        other.net[1].weight.mul_(-1)
    torch.save(other.state_dict(), folder / "other.pt")
    found = []
    for world in (1, 2):
        path = tmp_path_factory.mktemp(f"world{world}")
        plugin = Dumping(
            "hospital", variants=[0.9], listed=40, attribution="auto", attribution_samples=4,
            attribution_null=folder / "other.pt", name="bias_audit",
        )  # fmt: skip
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if world == 2 else "auto"
        trainer = pl.Trainer(
            callbacks=[plugin], accelerator="cpu", devices=world, strategy=strategy, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=path,
        )  # fmt: skip
        trainer.validate(Exact(), DataLoader(Pictures(), 50), verbose=False)
        found.append((torch.load(path / "found.pt", weights_only=False), Report.read(path)))
    return found


@pytest.mark.ddp
def test_two_processes_count_every_row_once_and_bit_equal_to_one(runs):
    one, two = (counts for counts, _ in runs)
    assert list(one) == list(two) == ["dense", "0.9"]
    for name in one:
        for a, b in zip(one[name], two[name], strict=True):
            assert (a is None and b is None) or (a == b).all()
    assert two["dense"][0].sum() == 569


@pytest.mark.parametrize("name", ["flips-validate-0.9", "susceptible-validate", "attribution-validate-0.9"])
def test_lists_hold_the_rows_of_all_processes(runs, name):
    one, two = (pd.read_csv(report.path.parent / "bias_audit" / f"{name}.csv") for _, report in runs)
    pd.testing.assert_frame_equal(one, two)
    assert len(one) == {"f": 40, "s": 40, "a": 3}[name[0]]
    if "id" in one:
        assert set(one["id"] % 2) == {0, 1}  # rows of both processes
    else:
        assert one["count"].tolist() == [4, 4, 4]
        assert one["interpretable"].all()


def test_findings_and_samples_on_the_page_are_those_of_one_process(runs):
    one, two = ([(f.code, f.severity, f.message, f.value) for f in report.findings] for _, report in runs)
    assert one == two
    titles = [re.findall(r"\d+: \d\b.*|(?:TP|FN|FP|TN) \w+", report.path.read_text("utf-8")) for _, report in runs]
    assert titles[0] == titles[1]
    assert len(titles[0]) > 10
    pictures = [report.path.read_text("utf-8").count("data:image/png") for _, report in runs]
    assert pictures[0] == pictures[1] > 20
