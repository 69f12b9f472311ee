"""A program for one process: everything of core is imported and at work, but for one service that is taken out."""

import importlib
import logging
import pkgutil
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundwire.host
from groundwire import Finding, Plugin, PluginError, Variant, hookimpl

#: Members of a plugin's run, by the service that gives them.
MEMBERS = {
    "scores": ("head", "raw_scores", "features"),
    "sample_ids": ("ids",),
    "variants": ("variants", "evaluate"),
    "report": ("findings", "directory"),
}
CALLS = ("variants", "evaluate")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Everything(Plugin):
    """Implements each hook, and says which were called."""

    score_stages, needs_ids, needs_features = ("train", "validate"), True, True

    def __init__(self, without):
        self.called, self.without = set(), without

    @hookimpl
    def gw_check(self, run):
        self.called.add("check")

    @hookimpl
    def gw_train_data(self, data):
        self.called.add("rows")
        data.keep(range(24))

    @hookimpl
    def gw_transform_model(self, module):
        self.called.add("model")

    @hookimpl
    def gw_batch_start(self, batch, stage, first_result):
        self.called.add("batch_start" if first_result is None else "batch_start in a replay")
        return stage

    @hookimpl
    def gw_gradient(self, step):
        self.called.add("gradient")
        return step.replay()

    @hookimpl
    def gw_scores(self, scores, fields, stage, variant, run):
        self.called.add("scores" if variant is None else "scores of a variant")
        if self.without != "sample_ids":
            assert variant is not None or len(run.ids) == len(scores)

    @hookimpl
    def gw_variants(self, module):
        return [Variant("same", nullcontext)]

    @hookimpl
    def gw_findings(self, run):
        self.called.add("report")
        if self.without != "variants" and run.stage == "validate":
            for variant in run.variants():
                self.called.add("variants")
                assert "accuracy" in run.evaluate(variant).metrics
        return [Finding("everything", "one", "info", 1.0, "One.")]

    @hookimpl
    def gw_provenance(self, run):
        self.called.add("checkpoint")
        return {"called": sorted(self.called)}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        run = groundwire.host.host_of(trainer).run.hooks._run_for("everything")
        for member in MEMBERS.get(self.without, ()):
            try:
                value = getattr(run, member)
                if member in CALLS:
                    value()
            except PluginError as error:
                assert f"run.{member} needs the service {self.without!r}" in str(error)  # noqa: PT017
            else:
                raise AssertionError(f"run.{member} is there without its service")


def trainer(plugin, folder, epochs=1):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(
        max_epochs=epochs, callbacks=[plugin], default_root_dir=folder, enable_checkpointing=False, **quiet
    )


def import_everything(service):
    gone = f"groundwire.services.{service}"
    for info in pkgutil.walk_packages(groundwire.__path__, "groundwire.", onerror=lambda name: None):
        if not info.name.startswith(gone) and info.name != "groundwire.__main__":
            importlib.import_module(info.name)


def use_everything(service):
    x = torch.randn(32, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
    with tempfile.TemporaryDirectory() as folder:
        module, plugin = Net(), Everything(service)
        fit = trainer(plugin, folder)
        fit.fit(module, loader, loader)
        fit.validate(module, loader, verbose=False)
        fit.save_checkpoint(Path(folder, "x.ckpt"))
        resumed = trainer(Everything(service), folder, 2)
        resumed.fit(Net(), loader, loader, ckpt_path=str(Path(folder, "x.ckpt")))
        assert resumed.global_step > fit.global_step
        stored = torch.load(Path(folder, "x.ckpt"), weights_only=True)
        assert ("groundwire" in stored) == (service != "checkpoint")
        assert any(Path(folder).rglob("findings.json")) == (service != "report")

    expected = {"check", "rows", "model", "batch_start", "batch_start in a replay", "gradient", "scores", "variants"}
    expected |= {"scores of a variant", "report", "checkpoint"}
    needs = {
        "scores": {"scores", "scores of a variant"},
        "gradient": {"gradient", "batch_start in a replay"},
        "variants": {"variants", "scores of a variant"},
        "report": {"report", "variants", "scores of a variant"},
        "sample_ids": set(),
    }
    assert plugin.called == expected - needs.get(service, {service}), plugin.called


if __name__ == "__main__":
    from blocked_service import block

    warnings.simplefilter("error")
    for advice in ("does not have many workers", "smaller than the logging interval", "LeafSpec", "GPU"):
        warnings.filterwarnings("ignore", f".*{advice}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    block(sys.argv[1])
    import_everything(sys.argv[1])
    use_everything(sys.argv[1])
