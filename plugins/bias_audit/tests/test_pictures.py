"""What people look at: flipped samples, samples of the confusion matrix, and where the models look."""

import re

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from groundwire import PluginError, Plugins, Report
from groundwire_bias_audit import BiasAudit
from groundwire_bias_audit.stream.samples import LONGEST, image


class Digits(Dataset):
    """scikit-learn's digits, at least 5 or not; the writer means nothing."""

    def __init__(self, rows=600):
        images, digits = load_digits(return_X_y=True)
        self.x = torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)[:rows]
        self.y = torch.tensor(digits >= 5).long()[:rows]
        self.writer = np.array(["ann", "bob"])[np.arange(rows) % 2]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Convolutional(pl.LightningModule):
    def __init__(self, seed=0, outputs=1):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1),
            nn.Linear(512, outputs),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        if scores.shape[1] > 1:
            return nn.functional.cross_entropy(scores, batch[1])
        return nn.functional.binary_cross_entropy_with_logits(scores[:, 0], batch[1].float())

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def trainer(folder, *callbacks, **options):
    return pl.Trainer(
        callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def fitted(folder, plugin=None, seed=0, outputs=1, **options):
    module = Convolutional(seed, outputs)
    loader = DataLoader(Digits(), 64)
    trainer(folder, *([plugin] if plugin else []), **options).fit(module, loader, loader)
    return module


@pytest.fixture(scope="module")
def null(tmp_path_factory):
    """The checkpoint of a model of another seed, as Lightning writes it."""
    folder = tmp_path_factory.mktemp("null")
    other = trainer(folder, num_sanity_val_steps=0)
    other.fit(Convolutional(1), DataLoader(Digits(), 64))
    other.save_checkpoint(folder / "other.ckpt")
    return folder / "other.ckpt"


@pytest.fixture(scope="module")
def audited(tmp_path_factory, null):
    folder = tmp_path_factory.mktemp("run")
    plugin = BiasAudit("writer", variants=[0.8, 0.9], attribution="auto", attribution_samples=5, attribution_null=null)
    module = fitted(folder, plugin)
    report = Report.read(folder)
    return plugin, module, report, {f.code: f for f in report.findings}


def test_attributions_of_flips_are_compared_by_group_and_with_the_null(audited):
    _, _, report, codes = audited
    found = pd.DataFrame(codes["attribution_shift@0.9"].value)
    assert found["writer"].tolist() == ["ann", "bob"]
    assert found["count"].between(1, 5).all()
    assert found["spearman"].between(-1, 1).all()
    assert found["interpretable"].all()
    assert (found["spearman_null_low"] == found["spearman_null_high"]).all()  # there is one null model
    assert "band of the null models" in codes["attribution_shift@0.9"].message
    written = pd.read_csv(report.path.parent / "bias_audit" / "attribution-validate-0.9.csv")
    assert written["spearman"].tolist() == pytest.approx(found["spearman"].tolist())


def test_the_page_shows_flips_cells_and_attribution_pairs_and_needs_no_other_file(audited):
    page = audited[2].path.read_text("utf-8")
    assert "could not be drawn" not in page
    for text in ("Flipped in variant 0.9", "Samples of the confusion by confidence", "Attributions (gradcam)"):
        assert text in page, text
    assert "TP certain" in page
    assert "the variant" in page
    sources = re.findall(r'(?:href|src)="([^"]{0,30})', page)
    assert all(source.startswith(("data:image/png;", "#")) for source in sources)
    pictures = sum(source.startswith("data:") for source in sources)
    # Two versions: at most 8 flips and 6 samples with two maps each; and 8 cells of at most 3.
    assert 8 + 6 <= pictures <= 2 * (8 + 3 * 6) + 8 * 3
    assert len(page) < 2_000_000


def test_every_sample_of_the_explorer_is_in_its_cell(audited):
    _, module, report, _ = audited
    data = Digits()
    with torch.no_grad():
        p = module.eval()(data.x)[:, 0].sigmoid()
    cells = {"TP": (1, 1), "FN": (1, 0), "FP": (0, 1), "TN": (0, 0)}
    text = re.sub(r"<[^>]*>", "", report.path.read_text("utf-8"))
    titles = re.findall(r"(TP|FN|FP|TN) (certain|uncertain)\s+(\d+): ([\d.]+)", text)
    assert len(titles) >= 8
    for kind, certainty, row, score in titles:
        label, predicted = cells[kind]
        value = float(p[int(row)])
        assert (int(data.y[int(row)]), int(value >= 0.5)) == (label, predicted)
        assert (0.1 < value < 0.9) == (certainty == "uncertain")
        assert float(score) == pytest.approx(value, abs=0.0051)


def test_training_is_bit_for_bit_as_without_attributions(audited, tmp_path):
    plain = fitted(tmp_path)
    for (name, a), b in zip(plain.state_dict().items(), audited[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_without_a_null_model_the_number_is_called_uninterpretable(tmp_path):
    plugin = BiasAudit("writer", variants=[0.9], attribution="input_x_gradient", attribution_samples=2)
    trainer(tmp_path, plugin).test(fitted(tmp_path / "fit", outputs=2), DataLoader(Digits(), 64), verbose=False)
    report = Report.read(tmp_path)
    finding = {f.code: f for f in report.findings}["attribution_shift@0.9"]
    assert "uninterpretable" in finding.message
    assert not any(row["interpretable"] for row in finding.value)
    assert "uninterpretable without a null model" in report.path.read_text("utf-8")


def test_attributions_are_off_by_default_and_computed_once(tmp_path, monkeypatch):
    from groundwire_bias_audit import callback

    epochs = []
    real = callback.explain_variants
    plugin = BiasAudit("writer", variants=[0.9], every_n_epochs=1, attribution="auto", attribution_samples=1)
    monkeypatch.setattr(callback, "explain_variants", lambda *a, **k: (epochs.append(1), real(*a, **k))[1])
    fitted(tmp_path, Plugins([plugin], report=False))
    assert epochs == [1]
    fitted(tmp_path / "off", Plugins([BiasAudit("writer", variants=[0.9])], report=False))
    assert epochs == [1]


def test_attributions_that_are_constant_are_called_undefined(tmp_path, null):
    plugin = BiasAudit("writer", variants=[0.99], attribution="auto", attribution_samples=2, attribution_null=null)
    fitted(tmp_path, plugin)  # all of the last layer's weights are gone, and with them all gradients
    message = {f.code: f.message for f in Report.read(tmp_path).findings}["attribution_shift@0.99"]
    assert "no correlation with the model's is defined" in message
    assert "within" not in message


def test_a_model_without_gradients_keeps_its_training(tmp_path):
    class Stubborn(Convolutional):
        def forward(self, x):
            if x.requires_grad:
                raise RuntimeError("this backend has no gradients")
            return self.net(x)

    module = Stubborn()
    loader = DataLoader(Digits(), 64)
    plugin = BiasAudit("writer", variants=[0.9], attribution="auto")
    trainer(tmp_path, plugin).fit(module, loader, loader)
    finding = {f.code: f for f in Report.read(tmp_path).findings}["attribution_shift@0.9"]
    assert finding.severity == "warn"
    assert "were not compared with the model's: RuntimeError: this backend has no gradients" in finding.message


def test_a_null_model_must_exist_and_fit(tmp_path, null):
    with pytest.raises(PluginError, match=r"null model .*nowhere.ckpt cannot be read"):
        fitted(tmp_path, BiasAudit("writer", attribution="auto", attribution_null=tmp_path / "nowhere.ckpt"))
    with pytest.raises(PluginError, match=r"does not fit: net\.5\.bias is"):
        fitted(tmp_path, BiasAudit("writer", attribution="auto", attribution_null=null), outputs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attribution": "gradcamm"}, "attribution must be"),
        ({"attribution": "auto", "attribution_samples": 0}, "attribution_samples"),
        ({"attribution_null": "a.ckpt"}, "name a method"),
        ({"attribution": "auto", "attribution_null": [3]}, "paths of checkpoints"),
    ],
)
def test_attribution_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiasAudit(**arguments)


def test_large_images_are_made_small():
    assert max(image(torch.rand(1, 3, 1000, 700)).shape) <= LONGEST
    assert image(torch.rand(1, 5)) is None
