"""CrAM inside a Trainer."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from groundwire import PluginError
from groundwire_cram import CrAM, prune


def neutral():
    return CrAM(plus=False, rho=0, sparsities=(0,))


def test_neutral_settings_train_bit_for_bit_as_without(kit):
    plain, ours = kit.Net(), kit.Net()
    kit.fit(plain)
    kit.fit(ours, neutral())
    assert kit.difference(plain.state_dict(), ours.state_dict()) == 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(kit, precision):
    module = kit.Net()
    with torch.random.fork_rng():
        kit.fit(module, CrAM(), precision=precision)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.ddp
def test_two_processes_agree_bit_for_bit(kit):
    class Module(kit.Net):
        def train_dataloader(self):
            return DataLoader(kit.data(), 4, sampler=DistributedSampler(kit.data(), shuffle=True))

        def on_train_end(self):
            torch.save(dict(self.named_parameters()), kit.path / f"rank{self.global_rank}.pt")

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    kit.trainer(CrAM(sparsities=(0.3, 0.6, 0.9)), strategy=strategy, devices=2, max_epochs=3).fit(Module())
    first, second = (torch.load(kit.path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert kit.difference(first, second) == 0.0


def test_the_draws_are_those_of_seed_and_step_so_a_resume_continues_them(kit):
    def draws(ckpt_path=None, max_epochs=2):
        found = []

        def spy(step_seed):
            found.append(draw(step_seed))
            return found[-1]

        cram = CrAM()
        draw, cram.minimizer.draw = cram.minimizer.draw, spy
        trainer = kit.fit(kit.Net(), cram, max_epochs=max_epochs, ckpt_path=ckpt_path)
        return found, trainer

    whole, full = draws()
    first, trainer = draws(max_epochs=1)
    trainer.save_checkpoint(kit.path / "half.ckpt", weights_only=False)
    second, resumed = draws(kit.path / "half.ckpt")
    assert whole == first + second
    assert len(set(whole)) > 1
    assert kit.difference(full.lightning_module.state_dict(), resumed.lightning_module.state_dict()) == 0.0


@pytest.mark.parametrize("pattern", ["global", "layerwise", "n:m mix"])
def test_one_copy_of_the_parameters_is_all_that_stays_in_memory_and_it_goes_with_the_run(kit, pattern):
    class See(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.copies = dict(cram.minimizer._buffers._known)
            self.sizes = {name: p.shape for name, p in pl_module.named_parameters()}

    cram, see = CrAM(pattern=pattern), See()
    kit.fit(kit.Net(), cram, see)
    assert {name: copy.shape for name, copy in see.copies.items()} == see.sizes
    assert all(copy.dtype == torch.float32 for copy in see.copies.values())
    assert not cram.minimizer._buffers._known


def test_checkpoints_have_no_tensor_more(kit):
    trainer = kit.fit(kit.Net(), CrAM())
    trainer.save_checkpoint(kit.path / "x.ckpt", weights_only=False)
    checkpoint = torch.load(kit.path / "x.ckpt", weights_only=True)
    assert checkpoint["callbacks"] == {}
    [plugin] = checkpoint["groundwire"]["plugins"]
    assert plugin["facts"] == {
        "compress": ["0.5", "0.7", "0.9"],
        "rho": 0.05,
        "plus": True,
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsities": (90,)}, r"\[0, 1\), got 90; did you mean 0.9"),
        ({"sparsities": ()}, "sparsities is empty"),
        ({"rho": -1}, "rho must be at least 0, got -1"),
        ({"rho": float("nan")}, "rho must be at least 0"),
        ({"rho": "a"}, "rho must be at least 0, got 'a'"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1"),
        ({"calibration": iter([])}, "can be read only once"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0"),
        ({"evaluate_every": 0.5}, "evaluate_every must be a whole number"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        CrAM(**options)


def test_a_model_with_nothing_to_prune_is_refused_before_training(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = nn.BatchNorm1d(8)

    with pytest.raises(PluginError, match=r"cram: there is nothing to prune: of 2 parameters none"):
        kit.fit(Module(), CrAM())


def test_plain_cram_gives_weights_unreached_by_the_replay_no_gradient(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.ones(2))
            self.passes = 0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + self.extra.sum() if self.trainer.strategy.model is not None and not self.muted() else loss

        def muted(self):
            return "log" in vars(self)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    kit.fit(module, CrAM(plus=False), max_steps=1)
    assert torch.equal(module.extra, torch.ones(2))
    module = Module()
    kit.fit(module, CrAM(plus=True), max_steps=1)
    assert torch.equal(module.extra, torch.full((2,), 0.9))


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_normalised_layers_are_refused_because_zeros_give_nan(kit, old_style):
    norm = nn.utils.weight_norm if old_style else nn.utils.parametrizations.weight_norm

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            norm(self.net[0])

    with pytest.raises(PluginError, match=r"cram: .*weight-normalised layer cannot be pruned"):
        kit.fit(Module(), CrAM())
    with pytest.raises(ValueError, match="weight-normalised layer cannot be pruned"):
        prune(Module(), 0.9, inplace=True)


@pytest.mark.parametrize("options", [{}, {"plus": False}, {"sparse_grad": False}], ids=str)
def test_sparse_embedding_gradients_train(kit, options):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 2)

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    rows = torch.utils.data.TensorDataset(torch.randint(0, 20, (16, 3)), torch.randint(0, 2, (16,)))
    module = Module()
    before = module.embedding.weight.detach().clone()
    kit.fit(module, CrAM(sparsities=(0.1,), **options), loader=DataLoader(rows, 8))
    assert torch.isfinite(module.embedding.weight).all()
    assert not torch.equal(module.embedding.weight, before)


def test_a_state_keeping_program_is_the_same_with_cram_but_for_the_gradient(kit):
    """Own lists and meters, direct logger calls, edited batches: each once, in the same order."""
    rows = []

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            rows.append((sorted(metrics), step))

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.outs, self.order = [], []
            self.net.insert(3, nn.Dropout(0.5))

        def on_train_batch_start(self, batch, batch_idx):
            batch[0] = batch[0] + 1

        def training_step(self, batch, batch_idx):
            self.outs.append(batch_idx)
            self.order.append(batch[0].sum().item())
            self.logger.log_metrics({"direct": 1.0}, step=batch_idx)
            return super().training_step(batch, batch_idx)

    results = []
    for callbacks in ([], [CrAM()]):
        rows.clear()
        torch.manual_seed(0)
        module = Module()
        loader = DataLoader(kit.data(), 8, shuffle=True)
        trainer = kit.fit(module, *callbacks, loader=loader, logger=Logger(kit.path), max_epochs=2, log_every_n_steps=1)
        results.append((module.outs, module.order, list(rows), set(trainer.callback_metrics)))
    assert results[0] == results[1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_inside_crams_replay_leaves_the_weights_of_before_the_step(kit, error):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            if "log" in vars(self):
                self.before = {k: v.clone() for k, v in self.state_dict().items()}
                raise error
            self.weights = {k: v.detach().clone() for k, v in self.named_parameters()}
            return super().training_step(batch, batch_idx)

    module = Module()
    with pytest.raises((RuntimeError, SystemExit)):
        kit.fit(module, CrAM())
    assert kit.difference(module.weights, dict(module.named_parameters())) == 0.0
    assert "log" not in vars(module)


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4", "grad_norm": True}, {"skip": ["net.3"], "interval": 2}])
def test_a_checkpoint_knows_its_arguments_and_makes_the_same_plugin_again(kit, options):
    trainer = kit.fit(kit.Net(), CrAM(**options))
    trainer.save_checkpoint(kit.path / "x.ckpt", weights_only=True)
    [entry] = torch.load(kit.path / "x.ckpt", weights_only=True)["groundwire"]["plugins"]
    again = CrAM(**entry["init"])
    assert list(map(str, again.operators)) == list(map(str, CrAM(**options).operators))
    assert again.skip == list(options.get("skip", []))
    assert again.interval == options.get("interval", 1)
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        again.speed  # noqa: B018
