"""Oracles: operators written out as matrices in float64, and their singular values."""

import torch


@torch.no_grad()
def matrix(function, shape):
    """The matrix of a linear ``function`` of one sample of ``shape``, by applying it to every unit vector."""
    size = torch.Size(shape).numel()
    zero = function(torch.zeros(1, *shape, dtype=torch.float64))
    columns = function(torch.eye(size, dtype=torch.float64).reshape(size, *shape)) - zero
    return columns.flatten(1).T


def largest(function, shape):
    """Its largest singular value."""
    return float(torch.linalg.svdvals(matrix(function, shape))[0])


def energy(function, shape):
    """Mean squared singular value over the rank: 1 for an isometry."""
    values = torch.linalg.svdvals(matrix(function, shape))
    return float(values.square().mean())


def kernels(shape, count, seed=0):
    """Random kernels and the nasty ones: constant, all positive, one tap, huge, tiny, zero columns."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    single = torch.zeros(shape, dtype=torch.float64)
    single.view(-1)[0] = 1.0
    gap = torch.randn(shape, generator=generator, dtype=torch.float64)
    gap[:, 0] = 0
    positive = torch.rand(shape, generator=generator, dtype=torch.float64)
    extra = [torch.ones(shape, dtype=torch.float64), positive, single, 1e6 * positive, 1e-5 * drawn[0], gap]
    return drawn + extra
