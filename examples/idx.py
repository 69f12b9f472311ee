"""Reading MNIST-format IDX files, plain or gzipped, with every number in a header checked against the file."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class IDXError(ValueError):
    """What is wrong with a file: which one, what was found, what was expected."""

    def __init__(self, path: Path, found: str, expected: str) -> None:
        super().__init__(f"{path}: found {found}, expected {expected}")


def read_array(path: Path, dimensions: int) -> Bytes:
    """The unsigned bytes in an IDX file: 3 dimensions (n, height, width) for images, 1 for labels."""
    content = _content(path)
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise IDXError(path, f"{len(content)} bytes", f"at least the {header} bytes of an IDX header")
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    # 0x08 is IDX's code for unsigned bytes; the last byte counts the dimensions.
    if magic != 0x0800 + dimensions:
        raise IDXError(
            path, f"magic number 0x{magic:08x}", f"0x{0x0800 + dimensions:08x} (unsigned bytes, {dimensions}-d)"
        )
    size = header + math.prod(shape)
    if len(content) != size:
        raise IDXError(path, f"{len(content)} bytes", f"{size} for the dimensions {shape} in its header")
    if not math.prod(shape):
        raise IDXError(path, f"dimensions {shape}", "at least one entry")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_pair(images: Path, labels: Path) -> tuple[Bytes, Bytes]:
    """Images (n, height, width) and labels (n,)."""
    x, y = read_array(images, 3), read_array(labels, 1)
    if len(x) != len(y):
        raise IDXError(labels, f"{len(y)} labels", f"{len(x)}, the number of images in {images.name}")
    return x, y


def find_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Image and label files in ``folder`` by prefix, such as "train" and "t10k"; of equal names the plain one."""
    pairs = {}
    for images in sorted(folder.glob("*-images-idx3-ubyte*"), reverse=True):
        prefix = images.name.partition("-images-idx3-ubyte")[0]
        labels = sorted(folder.glob(f"{prefix}-labels-idx1-ubyte*"))
        if not labels:
            raise IDXError(folder, f"{images.name} without labels", f"{prefix}-labels-idx1-ubyte or .gz next to it")
        pairs[prefix] = images, labels[0]
    if not pairs:
        what = "no image file" if folder.is_dir() else "no folder"
        raise IDXError(folder, what, "*-images-idx3-ubyte and *-labels-idx1-ubyte, plain or .gz")
    return pairs


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise IDXError(path, f"a damaged gzip file ({error})", "a whole one") from error
