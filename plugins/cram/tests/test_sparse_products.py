"""What a sparse layer computes is what the dense one computes: any shape, layout, type and program."""

import copy
import warnings

import pytest
import torch
from cram_sparse_layers import fast, pruned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundwire_cram import prune
from groundwire_cram.sparse import (
    SparseConv,
    SparseLinear,
    sparsity_report,
)

EPS = torch.finfo(torch.float32).eps


def bound(weight, bias, x):
    """The classic bound on the error of a sum of products in any order, twice: for ours and for torch's."""
    magnitude = x.abs() @ weight.abs().t() + (0 if bias is None else bias.abs())
    return 2 * (weight.shape[1] + 2) * EPS * magnitude


@st.composite
def problems(draw):
    out, into, batch = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(out, into, generator=generator)
    weight[torch.rand(out, into, generator=generator) >= draw(st.floats(0, 1))] = 0
    bias = torch.randn(out, generator=generator) if draw(st.booleans()) else None
    return weight, bias, torch.randn(batch, into, generator=generator)


@pytest.mark.parametrize("kernel", ["csr", "compiled"])
@given(problems(), st.sampled_from([None, 3, 32]))
@settings(deadline=None)
def test_products_equal_the_dense_one_up_to_the_order_of_summation(kernel, problem, tile):
    weight, bias, x = problem
    layer = SparseLinear(weight, bias, tile).eval()
    if kernel == "compiled":
        layer.use_compiled()
    found, wanted = layer(x), nn.functional.linear(x, weight, bias)
    assert found.is_contiguous()
    assert found.shape == wanted.shape
    assert bool(((found - wanted).abs() <= bound(weight, bias, x)).all())
    empty = (weight == 0).all(1)
    assert torch.equal(found[:, empty], wanted[:, empty])


@pytest.mark.parametrize("kernel", ["csr", "compiled"])
@given(problems(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=60)
def test_convolutions_equal_the_dense_ones(kernel, problem, dims, stride, images, size, batched):
    weight, bias, _ = problem
    weight = weight[(...,) + (None,) * dims]
    torch.manual_seed(size)
    x = torch.randn(*([images] if batched else []), weight.shape[1], *range(size, size + dims))
    layer = SparseConv(weight, bias, (stride,) * dims).eval()
    if kernel == "compiled":
        layer.use_compiled()
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[dims - 1]
    found, wanted = layer(x), convolve(x, weight, bias, stride)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_and_leading_dimensions_do_not_matter(layout):
    conv = prune(nn.Conv2d(20, 30, 1), 0.9).eval()
    x = torch.randn(3, 20, 6, 6).to(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(fast(conv, x)(x), conv(x), rtol=1e-4, atol=1e-5)
        linear, y = pruned(), torch.randn(48, 5, 2).permute(2, 1, 0)
        torch.testing.assert_close(fast(linear, y)(y), linear(y))
        torch.testing.assert_close(fast(linear, y[0, 0])(y[0, 0]), linear(y[0, 0]))


@given(st.lists(st.floats(0.2, 5), min_size=4, max_size=4), st.sampled_from([1, 2, 8, 33]), st.sampled_from([1, 4, 40]))
@settings(deadline=None, max_examples=40)
def test_whatever_is_decided_every_batch_gets_the_dense_result(ratios, measured, served):
    torch.manual_seed(measured)
    module = nn.Sequential(pruned(), nn.Unflatten(1, (48, 1)), prune(nn.Conv1d(48, 48, 1), 0.8), nn.Flatten(1)).eval()
    turn = iter(ratios * 3)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sparsify left")
            ours = fast(module, torch.randn(measured, 48), lambda dense, sparse: [(next(turn), 1.0)])
        x = torch.randn(served, 48)
        torch.testing.assert_close(ours(x), module(x), rtol=1e-4, atol=1e-5)


def test_reading_the_weight_of_a_sparse_layer_is_right():
    module = pruned()
    ours = fast(module, torch.randn(4, 48))
    assert torch.equal(ours[0].weight, module[0].weight)
    with pytest.raises(KeyError, match="already exists"):
        ours[0].weight = nn.Parameter(torch.zeros(40, 48))


@pytest.mark.parametrize(("inputs", "decision"), [(65536, "compiled"), (65537, "csr")])
def test_very_wide_layers_are_right(inputs, decision):
    layer = nn.Linear(inputs, 3).eval()
    with torch.no_grad():
        layer.weight[:, 5:-5] = 0
    x = torch.randn(4, inputs)
    ours = fast(layer, x)
    assert sparsity_report(ours)[""].decision == decision
    torch.testing.assert_close(ours(x), layer(x).detach())
    assert torch.equal(ours.weight, layer.weight)


def test_exchanged_buffers_are_used_at_once():
    one, two, x = pruned(seed=1), pruned(seed=2), torch.randn(6, 48)
    ours, other = fast(one, x), fast(two, x)
    for batch in (x, x[:1]):
        result = torch.func.functional_call(ours, other.state_dict(), batch)
        torch.testing.assert_close(result, two(batch).detach())
        torch.testing.assert_close(ours(batch), one(batch).detach())


@pytest.mark.parametrize("batch", [1, 8])
def test_export_and_compile_take_the_product_as_one_step(batch):
    x = torch.randn(batch, 48)
    module = nn.Sequential(pruned(), nn.Unflatten(1, (48, 1)), prune(nn.Conv1d(48, 20, 1), 0.8)).eval()
    ours = fast(module, x)
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
        assert "groundwire_cram.sparse_linear" in str(program.graph)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)
        quick = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(quick(x), module(x), rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()


def test_double_precision_is_kept_and_other_inputs_are_refused():
    module, x = pruned(), torch.randn(4, 48)
    ours = fast(module, x)
    for batch in (x, x[:1]):
        torch.testing.assert_close(
            copy.deepcopy(ours).double()(batch.double()), module.double()(batch.double()).detach()
        )
        module.float()
    doubles = fast(pruned().double(), x.double())
    assert [row.decision for row in sparsity_report(doubles).rows] == ["csr", "csr"]
    with pytest.warns(UserWarning, match="batch 1: the kernels need float32"):
        fast(pruned().double(), x[:1].double())
    for bad in (x.double(), x.half(), x.bfloat16(), x.long()):
        with pytest.raises(RuntimeError, match=r"SparseLinear holds torch\.float32 on cpu, got an input of"):
            ours(bad)
    with pytest.raises(RuntimeError, match=r"needs inputs \(..., 48\), got \(4, 47\)"):
        ours(x[:, :47])
    with pytest.raises(RuntimeError, match=r"SparseConv needs inputs \(N, 2, ...\), got \(3, 3, 4\)"):
        SparseConv(torch.ones(2, 2, 1), None, (1,)).eval()(torch.ones(3, 3, 4))


@pytest.mark.parametrize("batch", [1, 8])
def test_autocast_gives_its_own_type_as_for_dense(batch):
    module, x = pruned(), torch.randn(batch, 48)
    ours = fast(module, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = ours(x), module(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)
