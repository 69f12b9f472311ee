"""The rescale rule against matrices written out in float64."""

import math

import aol_operators as operators
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from groundwire_aol.layers.autocorrelation import (
    FAST_CHANNELS,
    FAST_CHANNELS_OF_FEW_TAPS,
    _HalfLags,
    autocorrelation,
    lag_sums,
)
from groundwire_aol.layers.rescale import Geometry, chosen_side, rescale, squared_scale

#: What rounding in float64 may add to a norm of exactly 1.
ROUNDING = 1e-12
few = settings(max_examples=60, deadline=None)
sides, steps = st.sampled_from(["auto", "in", "out"]), st.sampled_from([1, 2])


def kernel(seed, shape, kind):
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return {"gaussian": w, "positive": w.abs(), "constant": torch.ones_like(w), "huge": 1e8 * w, "tiny": 1e-7 * w}[kind]


kinds = st.sampled_from(["gaussian", "positive", "constant", "huge", "tiny"])


@few
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), kinds, sides, steps)
def test_a_dense_layer_never_has_a_norm_above_one(rows, columns, seed, kind, side, n):
    w = rescale(kernel(seed, (rows, columns), kind), side=side, steps=n)
    assert torch.linalg.matrix_norm(w, 2) <= 1 + ROUNDING


@few
@given(
    st.data(),
    st.integers(1, 2),
    st.integers(0, 10**6),
    kinds,
    sides,
    steps,
    st.sampled_from([1, 2]),
)
def test_a_convolution_with_zero_padding_never_has_a_norm_above_one(data, axes, seed, kind, side, n, groups):
    pick = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    size, stride, dilation, padding = pick(1, 3), pick(1, 4), pick(1, 3), pick(0, 3)
    weight = kernel(seed, (2 * groups, 2, *size), kind)
    w = rescale(weight, Geometry(stride, dilation, groups), side=side, steps=n)
    image = tuple(
        data.draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 8))
        for k, d, p in zip(size, dilation, padding, strict=True)
    )
    convolve = (F.conv1d, F.conv2d)[axes - 1]
    norm = operators.largest(
        lambda x: convolve(x, w, stride=stride, dilation=dilation, padding=padding, groups=groups), (2 * groups, *image)
    )
    assert norm <= 1 + ROUNDING


@few
@given(st.data(), st.integers(0, 10**6), kinds, sides, steps, st.sampled_from([1, 2]))
def test_a_transposed_convolution_never_has_a_norm_above_one(data, seed, kind, side, n, groups):
    k, s, d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    p, extra = data.draw(st.integers(0, 1)), data.draw(st.integers(0, max(s, d) - 1))
    w = rescale(
        kernel(seed, (2 * groups, 2, k, k), kind), Geometry((s, s), (d, d), groups, transposed=True), side=side, steps=n
    )
    options = {"stride": s, "dilation": d, "padding": p, "output_padding": extra, "groups": groups}
    assert operators.largest(lambda x: F.conv_transpose2d(x, w, **options), (2 * groups, 4, 3)) <= 1 + ROUNDING


@few
@given(st.data(), st.integers(0, 10**6), kinds, sides, steps)
def test_circular_padding_never_has_a_norm_above_one(data, seed, kind, side, n):
    k, s, d = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    w = rescale(kernel(seed, (3, 2, k, k), kind), Geometry((s, s), (d, d), circular=True), side=side, steps=n)
    total = d * (k - 1)
    left, size = total // 2, data.draw(st.integers(max(1, total), 7))

    def layer(x):
        return F.conv2d(F.pad(x, [left, total - left] * 2, mode="circular"), w, stride=s, dilation=d)

    assert operators.largest(layer, (2, size, size)) <= 1 + ROUNDING


def published(weight, eps=1e-6):
    """The rule of the paper, written as loops over channels and lags."""
    _out, channels, height, width = weight.shape
    sums = torch.zeros(channels, dtype=weight.dtype)
    for i in range(channels):
        for j in range(channels):
            for dy in range(1 - height, height):
                for dx in range(1 - width, width):
                    total = 0.0
                    for y in range(height):
                        for x in range(width):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                total += float(weight[:, i, y, x] @ weight[:, j, y + dy, x + dx])
                    sums[i] += abs(total)
    return weight * (sums + eps).rsqrt()[:, None, None]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (2, 5, 3, 2), (3, 3, 1, 1)])
def test_the_reference_mode_is_the_published_rule(shape, stride):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = rescale(w, Geometry((stride, stride), (1, 1)), compat="reference")
    assert (ours.double() - published(w.double())).abs().max() <= 1e-6


def test_the_reference_mode_of_a_dense_layer_scales_input_columns():
    p = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = p / ((p.T @ p).abs().sum(1) + 1e-6).sqrt()
    assert (rescale(p, compat="reference") - expected).abs().max() <= 1e-12


def test_phases_of_a_strided_convolution_keep_more_than_one_channel_scale():
    found = {"phases": [], "channels": []}
    for seed in range(10):
        w = kernel(seed, (8, 4, 3, 3), "gaussian")
        for name, compat in (("phases", None), ("channels", "reference")):
            scaled = rescale(w, Geometry((2, 2), (1, 1)), compat=compat)
            layer = lambda x, scaled=scaled: F.conv2d(x, scaled, stride=2, padding=1)  # noqa: E731
            found[name].append((operators.largest(layer, (4, 8, 8)), operators.energy(layer, (4, 8, 8))))
    norm, energy = torch.tensor(found["phases"]).mean(0)
    loose_norm, loose_energy = torch.tensor(found["channels"]).mean(0)
    assert norm > 1.3 * loose_norm
    assert energy > 2 * loose_energy


def test_a_second_step_is_tighter():
    w = kernel(0, (8, 8, 3, 3), "gaussian")
    norms = [operators.largest(lambda x, n=n: F.conv2d(x, rescale(w, steps=n), padding=1), (8, 6, 6)) for n in (1, 2)]
    assert 1.1 * norms[0] < norms[1] <= 1


@pytest.mark.parametrize("shape", [(6, 6), (8, 4), (4, 8)])
def test_an_orthogonal_matrix_stays_as_it_is(shape):
    w = torch.nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64))
    assert (rescale(w) - w).abs().max() < 1e-6


@pytest.mark.parametrize("n", [1, 2])
def test_an_empty_column_stays_empty_with_a_finite_gradient(n):
    w = kernel(0, (4, 3, 3, 3), "gaussian")
    w[:, 1] = 0
    w.requires_grad_()
    scaled = rescale(w, side="in", steps=n)
    scaled.square().sum().backward()
    assert not scaled[:, 1].any()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (FAST_CHANNELS, 20),
        (FAST_CHANNELS, 4, 5),
        (FAST_CHANNELS, 4, 1, 1),
        (FAST_CHANNELS_OF_FEW_TAPS, 20, 3),
        (FAST_CHANNELS_OF_FEW_TAPS, 10, 3, 2),
        (FAST_CHANNELS_OF_FEW_TAPS, 64, 3, 3),
        (FAST_CHANNELS_OF_FEW_TAPS, 6, 2, 1, 3),
    ],
)
def test_half_of_the_lags_give_the_same_sums_and_gradients(shape, transposed, groups):
    w = torch.randn(groups, *shape, generator=torch.Generator().manual_seed(0))
    if transposed:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    w.requires_grad_()
    weights = torch.rand(groups, shape[0], generator=torch.Generator().manual_seed(1))
    exact = w.detach().double().requires_grad_()
    expected = autocorrelation(exact).abs().flatten(2).sum(2)
    (expected * weights).sum().backward()
    sums = lag_sums(w)
    assert "HalfLags" in type(sums.grad_fn).__name__
    (sums * weights).sum().backward()
    assert (sums - expected).abs().max() / expected.abs().max() < 1e-6
    assert (w.grad - exact.grad).abs().max() / exact.grad.abs().max() < 1e-6


@pytest.mark.parametrize("taps", [(3, 3), (5,)])
def test_autocast_does_not_reach_the_gradient_of_the_fast_sums(taps):
    w = torch.randn(1, FAST_CHANNELS, 4, *taps, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(lag_sums(w).sum(), w)
    sums = lag_sums(w)
    with torch.autocast("cpu"):
        (found,) = torch.autograd.grad(sums.sum(), w)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("taps", [(3,), (2, 3), (3, 3)])
def test_a_kernel_of_its_centre_alone_has_the_gradient_of_its_centre_alone(taps):
    w = torch.zeros(1, FAST_CHANNELS, FAST_CHANNELS, *taps)
    centre = (slice(None), slice(None), slice(None), *(k // 2 for k in taps))
    w[centre] = torch.eye(FAST_CHANNELS)
    w.requires_grad_()
    lag_sums(w).sum().backward()
    expected = torch.zeros_like(w)
    expected[centre] = 2 * torch.eye(FAST_CHANNELS)
    # At lags where nothing overlaps the derivative of |v| is taken as 0, so other taps stay empty.
    assert torch.allclose(w.grad, expected, atol=1e-5)


def test_the_fast_sums_can_be_derived_twice():
    w = torch.randn(1, 3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(_HalfLags.apply, w)
    assert torch.autograd.gradgradcheck(_HalfLags.apply, w)


def test_the_sums_can_be_mapped_and_derived_by_torch_func():
    many = torch.randn(4, 1, FAST_CHANNELS, 2, 3, dtype=torch.float64)
    each = torch.stack([lag_sums(x) for x in many])
    assert torch.allclose(torch.func.vmap(lag_sums)(many), each, rtol=1e-12)
    x = many[0].clone().requires_grad_()
    lag_sums(x).sum().backward()
    assert torch.allclose(torch.func.grad(lambda w: lag_sums(w).sum())(many[0]), x.grad, rtol=1e-10)


def test_the_scale_dominates_the_gram_matrix():
    w = kernel(3, (6, 4), "gaussian")
    for n in (1, 2):
        d = squared_scale(w, Geometry(), steps=n, side="in")[0]
        assert torch.linalg.eigvalsh(torch.diag(d) - w.T @ w).min() > 0


@pytest.mark.parametrize(("shape", "side"), [((8, 4), "in"), ((4, 8), "out"), ((4, 4), "in")])
def test_the_smaller_side_is_scaled(shape, side):
    assert chosen_side(torch.zeros(shape), Geometry()) == side


@pytest.mark.parametrize("wrong", [{"steps": 3}, {"side": "left"}, {"geometry": Geometry((1,), (1,))}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|has 0 axes"):
        rescale(torch.ones(2, 2), **wrong)


def test_phases_need_the_dilation():
    """Two taps of dilation 2 and stride 2 always meet the same pixels: treating them as two phases gives 1.53."""
    assert Geometry((2, 2), (2, 2)).phases == (1, 1)
    assert math.prod(Geometry((2, 2), (2, 3)).phases) == 2
