"""The demo's data: scikit-learn's digits, or MNIST-format files of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from idx import IDXError, find_pairs, read_pair
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

Array = NDArray[np.generic]
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Data:
    """Images (n, 1, height, width) in [0, 1] with their labels."""

    train: TensorDataset
    test: TensorDataset
    classes: int


def digits(seed: int, limit: int | None = None) -> Data:
    """1797 images of 8 x 8 pixels, which come with scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    return prepare(*split(images.reshape(-1, 8, 8) / 16, labels, seed), seed, limit)


def files(folder: Path, seed: int, limit: int | None = None) -> Data:
    """The train and t10k files in ``folder`` as they are, or its only pair of files split."""
    pairs = find_pairs(folder)
    if {"train", "t10k"} <= set(pairs):
        train, test = read_pair(*pairs["train"]), read_pair(*pairs["t10k"])
    elif len(pairs) == 1:
        train, test = split(*read_pair(*next(iter(pairs.values()))), seed)
    else:
        raise IDXError(folder, f"the pairs {', '.join(sorted(pairs))}", "train and t10k, or one pair")
    return prepare(*((images / 255, labels) for images, labels in (train, test)), seed, limit)


def split(images: Array, labels: Array, seed: int) -> tuple[Pair, Pair]:
    """70 % for training, 30 % for testing, every class in both."""
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.3, stratify=labels, random_state=seed
    )
    return (train_x, train_y), (test_x, test_y)


def prepare(train: Pair, test: Pair, seed: int, limit: int | None) -> Data:
    """Tensors of at most ``limit`` images each, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    classes = 1 + int(max(train[1].max(), test[1].max()))
    return Data(draw(train, limit, generator), draw(test, limit, generator), classes)


def draw(pair: Pair, limit: int | None, generator: torch.Generator) -> TensorDataset:
    images, labels = (torch.tensor(array) for array in pair)
    chosen = torch.randperm(len(images), generator=generator)[:limit]
    return TensorDataset(images[chosen, None].float(), labels[chosen].long())
