"""The demo at a small size: the table has every row and column, the report is there, and user files are taken."""

import json
import logging
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

LOGGERS = ("lightning.pytorch", "lightning.fabric")


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import demo

    threads, levels = torch.get_num_threads(), {log: log.level for log in map(logging.getLogger, LOGGERS)}
    yield demo
    torch.set_num_threads(threads)
    for log, level in levels.items():
        log.setLevel(level)
    for name in ("demo", "digits", "idx"):
        sys.modules.pop(name)


def check(results, output, seeds):
    """Three ways of training, dense and three levels each."""
    assert list(results) == ["SGD", "SGD twice as long", "SGD with CrAM"]
    accuracies = np.array([results[name] for name in results])
    assert accuracies.shape == (3, seeds, 4)
    assert ((accuracies >= 0) & (accuracies <= 100)).all()
    pages = sorted(output.rglob("report.html"))
    assert len(pages) == seeds
    findings = json.loads(pages[0].with_name("findings.json").read_text())["findings"]
    assert {"accuracy@dense", "accuracy@0.95"} <= {finding["code"] for finding in findings}
    return pages


def test_digits(demo, tmp_path, capsys):
    results = demo.main(seeds=2, epochs=2, limit=128, output=tmp_path)
    pages = check(results, tmp_path, seeds=2)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("95% pruned", "SGD with CrAM", " ± ", f"Report: {pages[-1]}"))
    final = np.mean([row[-1] for row in results["SGD with CrAM"]])
    assert f"SGD with CrAM keeps {final:.1f} of" in shown


def write_pair(folder, prefix, n):
    labels = np.arange(n, dtype=np.uint8) % 3
    images = np.random.default_rng(0).integers(0, 256, (n, 6, 5), dtype=np.uint8)
    header = struct.pack(">4I", 0x803, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + labels.tobytes())


def test_one_pair_of_files_is_split(demo, tmp_path):
    write_pair(tmp_path, "t10k", 60)
    check(demo.main(data=tmp_path, seeds=1, epochs=1, output=tmp_path / "out"), tmp_path / "out", seeds=1)
    data = demo.files(tmp_path, seed=0)
    assert (len(data.train), len(data.test), data.classes) == (42, 18, 3)
    assert float(data.train.tensors[0].max()) <= 1


def test_train_and_t10k_are_used_as_they_are(demo, tmp_path):
    write_pair(tmp_path, "train", 9)
    write_pair(tmp_path, "t10k", 6)
    data = demo.files(tmp_path, seed=0)
    assert (len(data.train), len(data.test)) == (9, 6)


def test_pairs_that_are_neither_are_refused(demo, tmp_path):
    write_pair(tmp_path, "a", 9)
    write_pair(tmp_path, "b", 9)
    with pytest.raises(demo.IDXError, match="found the pairs a, b, expected train and t10k, or one pair"):
        demo.files(tmp_path, seed=0)


@pytest.mark.slow
def test_cram_keeps_at_95_percent_what_sgd_loses(demo, tmp_path):
    """The claim of the demo, at full size with one seed."""
    demo.quiet()
    torch.set_num_threads(1)
    data, kept = demo.digits(0), {}
    for name in ("SGD", "SGD with CrAM"):
        epochs, callbacks = demo.ways(15)[name]
        model, _ = demo.train(data, epochs, 0, tmp_path / name, callbacks)
        kept[name] = demo.accuracies(model, data)
    dense, *_, pruned = kept["SGD with CrAM"]
    assert kept["SGD"][-1] < 90 < 95 < pruned
    assert abs(dense - kept["SGD"][0]) < 2
