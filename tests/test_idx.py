"""The demo's reader of MNIST-format files: what it reads, and what it says about files that are not right."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def idx(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import idx

    yield idx
    sys.modules.pop("idx")


def encoded(array, magic=None):
    return struct.pack(f">{1 + array.ndim}I", magic or 0x0800 + array.ndim, *array.shape) + array.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([7, 1], dtype=np.uint8)


def write(folder, images=None, labels=None, prefix="t10k", suffix=""):
    paths = folder / f"{prefix}-images-idx3-ubyte{suffix}", folder / f"{prefix}-labels-idx1-ubyte{suffix}"
    paths[0].write_bytes(encoded(IMAGES) if images is None else images)
    paths[1].write_bytes(encoded(LABELS) if labels is None else labels)
    return paths


def refused(idx, paths, *words):
    with pytest.raises(idx.IDXError) as error:
        idx.read_pair(*paths)
    for word in (*words, "found", "expected"):
        assert str(word) in str(error.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_round_trip(idx, tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    write(tmp_path, pack(encoded(IMAGES)), pack(encoded(LABELS)), suffix=suffix)
    images, labels = idx.read_pair(*idx.find_pairs(tmp_path)["t10k"])
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


def test_a_truncated_file_is_named_with_both_sizes(idx, tmp_path):
    paths = write(tmp_path, images=encoded(IMAGES)[:-1])
    refused(idx, paths, paths[0], "39 bytes", "40 for the dimensions [2, 3, 4]")


def test_bytes_after_the_end_are_refused(idx, tmp_path):
    refused(idx, write(tmp_path, labels=encoded(LABELS) + b"x"), "11 bytes", "10 for")


def test_a_file_shorter_than_its_header(idx, tmp_path):
    refused(idx, write(tmp_path, images=b"\0\0\x08\x03"), "4 bytes", "16 bytes of an IDX header")


def test_labels_in_place_of_images(idx, tmp_path):
    wrong = encoded(LABELS) + bytes(20)
    refused(idx, write(tmp_path, images=wrong), "0x00000801", "0x00000803 (unsigned bytes, 3-d)")


def test_other_element_types_are_refused(idx, tmp_path):
    refused(idx, write(tmp_path, labels=encoded(LABELS, magic=0x0D01)), "0x00000d01", "0x00000801")


def test_counts_that_differ(idx, tmp_path):
    paths = write(tmp_path, labels=encoded(LABELS[:1]))
    refused(idx, paths, paths[1], "1 labels", "2, the number of images")


def test_no_entries(idx, tmp_path):
    refused(idx, write(tmp_path, images=encoded(IMAGES[:0])), "[0, 3, 4]", "at least one entry")


def test_a_damaged_gzip_file(idx, tmp_path):
    damaged = gzip.compress(encoded(IMAGES))[:-9]
    refused(idx, write(tmp_path, images=damaged, suffix=".gz"), "a damaged gzip file", "a whole one")


def test_missing_labels(idx, tmp_path):
    write(tmp_path)[1].unlink()
    with pytest.raises(idx.IDXError, match="found t10k-images-idx3-ubyte without labels, expected t10k-labels-idx1"):
        idx.find_pairs(tmp_path)


@pytest.mark.parametrize(("folder", "found"), [(".", "no image file"), ("elsewhere", "no folder")])
def test_nothing_there(idx, tmp_path, folder, found):
    with pytest.raises(idx.IDXError, match=f"found {found}, expected"):
        idx.find_pairs(tmp_path / folder)


def test_pairs_by_prefix_and_the_plain_file_of_two(idx, tmp_path):
    write(tmp_path, prefix="train")
    write(tmp_path, suffix=".gz")
    plain = write(tmp_path)
    assert idx.find_pairs(tmp_path) == {"train": write(tmp_path, prefix="train"), "t10k": plain}
