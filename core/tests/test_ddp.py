"""Two real processes (gloo). The parent reads what the ranks wrote."""

import json

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from groundwire import Finding, Plugin, hookimpl


@pytest.mark.ddp
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
def test_two_ranks_equal_one_process_with_the_double_batch(kit, options):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net[1] = torch.nn.Identity()  # BatchNorm statistics are per rank, with or without a plugin

        def train_dataloader(self):
            sampler = DistributedSampler(kit.data(), shuffle=False)
            return DataLoader(kit.data(), 4, sampler=sampler)

        def on_train_end(self):
            torch.save(self.state_dict(), kit.path / f"rank{self.global_rank}.pt")

    class Watch(kit.SAM):
        @hookimpl
        def gw_findings(self, run):
            assert run.trainer.world_size == 2
            return [Finding("sam", "rank", "info", run.trainer.global_rank, "The rank that found it.")]

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", **options)
    callbacks = [Watch()]
    trainer = kit.trainer(
        *callbacks,
        strategy=strategy,
        devices=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        use_distributed_sampler=False,
    )
    trainer.fit(Module())
    first, second = (torch.load(kit.path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert kit.difference(first, second) == 0.0

    class Single(Module):
        def train_dataloader(self):
            return DataLoader(kit.data(), 8)

    single = Single()
    kit.trainer(kit.SAM(), accumulate_grad_batches=2, gradient_clip_val=0.3).fit(single)
    assert kit.difference(first, single.state_dict()) < 1e-6
    [folder] = (kit.path / "groundwire").glob("*/findings.json")
    ranks = [f["value"] for f in json.loads(folder.read_text())["findings"] if f["plugin"] == "sam"]
    assert 0 in ranks


@pytest.mark.ddp
def test_a_refusal_on_all_ranks_does_not_hang(kit):
    class Refuses(Plugin):
        @hookimpl
        def gw_check(self, run):
            from groundwire import Problem

            return [Problem("refuses", f"world size {run.trainer.world_size}")] if run.ready else []

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    with pytest.raises(Exception, match="refuses: world size 2"):
        kit.trainer(Refuses(), strategy=strategy, devices=2).fit(kit.Net(), kit.loader())


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")
def test_ranks_may_log_different_names_and_facts_are_asked_on_the_first_only(kit):
    class Module(kit.Net):
        def validation_step(self, batch, batch_idx):
            self.log("everywhere", float(self.global_rank), sync_dist=True)
            if self.global_rank == 0:
                self.log("first", 1.0, rank_zero_only=True)

    class Evaluates(Plugin):
        name = "evaluates"

        @hookimpl
        def gw_findings(self, run):
            if run.stage != "validate":
                return None
            found = run.evaluate().metrics
            return [Finding("evaluates", name, "info", value, "") for name, value in found.items()]

        @hookimpl
        def gw_provenance(self, run):
            assert run.trainer.global_rank == 0

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    kit.trainer(Evaluates(), strategy=strategy, devices=2).fit(Module(), kit.loader(), kit.loader())
    [file] = (kit.path / "groundwire").glob("*/findings.json")
    values = {f["code"]: f["value"] for f in json.loads(file.read_text())["findings"]}
    assert values == {"everywhere": 0.5, "first": 1.0}


class Chooses(Plugin):
    """Decides from what its own rank saw, as a score of rows does that nobody gathers."""

    name = "chooses"

    def __init__(self, what):
        self.what = what

    @hookimpl
    def gw_train_data(self, data, run):
        rank = run.trainer.global_rank
        if self.what == "rows":
            data.keep(range(rank, 20 + rank))
        elif self.what == "counts":
            data.keep(range(20 + rank))
        elif rank:
            data.weights([1.0] * 39 + [2.0])
        else:
            data.weights([1.0] * 40)


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "the kept row at place 0 is 0 on rank 0 and 1 on rank 1"),
        ("counts", "rank 0 keeps 20 rows, and rank 1 21"),
        ("weights", "the weight of row 39 is 1.0 on rank 0 and 2.0 on rank 1"),
    ],
)
def test_rows_that_differ_between_ranks_are_refused(kit, what, message):
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    with pytest.raises(Exception, match=f"gw_train_data of chooses: {message}"):
        kit.trainer(Chooses(what), strategy=strategy, devices=2).fit(kit.Net(), kit.loader())
