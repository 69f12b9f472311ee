"""Two processes."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from limes_digit_stream import HOUR, Digits, Listed, Spy, offset_on, stream
from torch.utils.data import DataLoader

from groundwire_limes import LIMES


@pytest.mark.ddp
@pytest.mark.parametrize("training_prior", ["running", "forecast"])
def test_two_processes_agree_on_steps_counts_and_offsets(kit, training_prior):
    data, times = stream(12, rows=80)

    class Ragged(pl.LightningDataModule):
        """The ranks cross the hours at different batches."""

        def train_dataloader(self):
            rank = self.trainer.global_rank
            rows = np.arange(rank, len(data), 2)
            rows = rows[12:] if rank else rows[:-12]
            return DataLoader([(*data[i], {"timestamp": float(times[i])}) for i in rows], 26, drop_last=True)

    class Seen(Spy):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            steps = {s: f.prior.tolist() for s, f in limes._tracker._awaiting_labels.items()}
            kept.append((limes._tracker.current, steps))

        def on_train_end(self, trainer, pl_module):
            state = {"kept": kept, "state": limes.extrapolator.state_dict(), "weights": dict(pl_module.state_dict())}
            torch.save(state, kit.path / f"rank{trainer.global_rank}.pt")

    kept = []
    limes = LIMES(training_prior=training_prior)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = kit.trainer(limes, Seen(), strategy=strategy, devices=2, use_distributed_sampler=False)
    trainer.fit(Digits(), datamodule=Ragged())
    one, two = (torch.load(kit.path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert kit.difference(one["weights"], two["weights"]) == 0.0
    assert one["state"] == two["state"]
    total = np.sum(one["state"]["counts"], axis=0)
    used = [(np.arange(r, len(data), 2)[12:] if r else np.arange(r, len(data), 2)[:-12]) for r in (0, 1)]
    used = np.concatenate([u[: len(u) // 26 * 26] for u in used])
    assert np.array_equal(total, np.bincount(data.tensors[1][used].numpy(), minlength=10))
    for (step, made), (other, also) in zip(one["kept"], two["kept"], strict=True):
        assert step == other
        assert all(made[s] == also[s] for s in made.keys() & also.keys())


@pytest.mark.ddp
def test_each_process_has_the_offset_of_its_own_hour_in_a_model_with_buffers_too(kit):
    """DDP gives all processes the first one's buffers before each forward, in models that have any of their own."""

    class Buffered(Digits):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(64, affine=False)

        def forward(self, x):
            return super().forward(self.norm(x))

        def training_step(self, batch, batch_idx):
            written.append(offset_on(self.net[2]))
            return super().training_step(batch, batch_idx)

    class Apart(pl.LightningDataModule):
        """The second process is an hour ahead."""

        def train_dataloader(self):
            rank = self.trainer.global_rank
            return Listed(
                [(torch.randn(8, 64), torch.full((8,), h % 3), {"timestamp": (h + rank) * HOUR}) for h in range(6)]
            )

    class Seen(Spy):
        def on_train_end(self, trainer, pl_module):
            torch.save((written, self.offsets), kit.path / f"rank{trainer.global_rank}.pt")

    written = []
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = kit.trainer(LIMES(training_prior="forecast"), Seen(), strategy=strategy, devices=2)
    trainer.fit(Buffered(), datamodule=Apart())
    ranks = [torch.load(kit.path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(torch.stack(before), torch.stack(used)) for before, used in ranks)
    assert not torch.equal(torch.stack(ranks[0][1]), torch.stack(ranks[1][1]))
