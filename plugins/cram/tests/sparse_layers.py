"""Pruned modules, and sparsify with a measurement that decides as the test wants."""

import torch
from torch import nn

from groundwire_cram import prune
from groundwire_cram.sparse import sparsify


def always(dense, sparse):
    return [(2.0, 1.0)]


def never(dense, sparse):
    return [(1.0, 2.0)]


def fast(module, x, measure=always, **options):
    return sparsify(module, x, progress=False, measure=measure, **options)


def pruned(n=48, out=40, sparsity=0.9, seed=0):
    torch.manual_seed(seed)
    return prune(nn.Sequential(nn.Linear(n, out), nn.ReLU(), nn.Linear(out, n)), sparsity).eval()
