"""Two real processes (gloo). The parent reads what the ranks wrote."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from groundwire import Finding, Plugin, hookimpl


def interleaved(kit):
    """The rows in an order in which two ranks with batch 4 see together what one process sees with batch 8."""
    return kit.data()


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
def test_two_ranks_equal_one_process_with_the_double_batch(kit, options):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net[1] = torch.nn.Identity()  # BatchNorm statistics are per rank, with or without a plugin

        def train_dataloader(self):
            sampler = DistributedSampler(interleaved(kit), shuffle=False)
            return DataLoader(interleaved(kit), 4, sampler=sampler)

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
            return DataLoader(interleaved(kit), 8)

    single = Single()
    kit.trainer(kit.SAM(), accumulate_grad_batches=2, gradient_clip_val=0.3).fit(single)
    assert kit.difference(first, single.state_dict()) < 1e-6
    [folder] = (kit.path / "groundwire").glob("*/findings.json")
    ranks = [f["value"] for f in json.loads(folder.read_text())["findings"] if f["plugin"] == "sam"]
    assert 0 in ranks


def test_an_idle_plugin_and_a_refusal_on_all_ranks_do_not_hang(kit):
    class Refuses(Plugin):
        @hookimpl
        def gw_check(self, run):
            from groundwire import Problem

            return [Problem("refuses", f"world size {run.trainer.world_size}")] if run.ready else []

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    with pytest.raises(Exception, match="refuses: world size 2"):
        kit.trainer(Refuses(), strategy=strategy, devices=2).fit(kit.Net(), kit.loader())
    assert issubclass(Refuses, pl.Callback)
