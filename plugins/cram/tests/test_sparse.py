"""What sparsify decides, and that its result computes what the dense module computes."""

import copy
import io
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundwire_cram import prune
from groundwire_cram.sparse import (
    SparseConv,
    SparseLinear,
    compiled,
    compiler,
    densify,
    semi_structured,
    sparsify,
    sparsity_report,
)
from groundwire_cram.sparse.timing import measure, summary

EPS = torch.finfo(torch.float32).eps


def always(dense, sparse):
    return [(2.0, 1.0)]


def never(dense, sparse):
    return [(1.0, 2.0)]


def fast(module, x, measure=always, **options):
    return sparsify(module, x, progress=False, measure=measure, **options)


def pruned(n=48, out=40, sparsity=0.9, seed=0):
    torch.manual_seed(seed)
    return prune(nn.Sequential(nn.Linear(n, out), nn.ReLU(), nn.Linear(out, n)), sparsity).eval()


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


@pytest.mark.parametrize(
    ("rounds", "least", "decision"),
    [
        ([(1.0, 1.0)], 1.0, "dense"),
        ([(1.04, 1.0)], 1.0, "dense"),
        ([(1.06, 1.0)], 1.0, "compiled"),
        ([(1.06, 1.0)] * 9 + [(9.0, 1.0)], 1.0, "compiled"),
        ([(1.0, 1.0), (9.0, 1.0), (9.0, 1.0)], 1.0, "dense"),
        ([(3.0, 1.0)] * 50 + [(0.1, 1.0)] * 10, 1.0, "compiled"),
        ([(3.0, 1.0)] * 31 + [(0.1, 1.0)] * 29, 1.0, "dense"),
        ([(1.9, 1.0)], 2.0, "dense"),
        ([(2.2, 1.0)], 2.0, "compiled"),
    ],
)
def test_a_layer_becomes_sparse_only_when_faster_beyond_noise(rounds, least, decision):
    module = pruned()
    with pytest.warns(UserWarning, match="not faster") if decision == "dense" else nullcontext():
        ours = fast(module, torch.randn(8, 48), lambda dense, sparse: rounds, min_speedup=least)
    report = sparsity_report(ours)
    assert [row.decision for row in report.rows] == [decision] * 2
    assert [type(ours[0]), type(ours[2])] == [nn.Linear if decision == "dense" else SparseLinear] * 2
    assert type(module[0]) is nn.Linear


def test_the_fastest_way_is_taken_and_all_of_them_are_timed_with_the_shapes_that_the_layer_gets():
    module, seen = pruned(), []

    def recorded(dense, sparse):
        seen.append((tuple(dense().shape), tuple(sparse().shape)))
        return [(2.0 if len(seen) % 3 == 2 else 1.5, 1.0)]

    ours = fast(module, torch.randn(5, 20, 48), recorded)
    assert seen == [((5, 20, 40),) * 2] * 3 + [((5, 20, 48),) * 2] * 3
    assert [row.decision for row in sparsity_report(ours).rows] == ["csr", "csr"]
    assert [row.batch for row in sparsity_report(ours).rows] == [100, 100]
    assert not ours[0].is_compiled


def test_a_layer_called_with_two_shapes_must_be_faster_with_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = prune(nn.Linear(20, 20), 0.9)

        def forward(self, x):
            return self.layer(x).mean() + self.layer(x[:2]).mean()

    module = Twice().eval()

    def slow_on_two(dense, sparse):
        return [(0.5 if len(dense()) == 2 else 3.0, 1.0)]

    with pytest.warns(UserWarning, match="not faster"):
        assert type(fast(module, torch.randn(9, 20), slow_on_two).layer) is nn.Linear
    ours = fast(module, torch.randn(9, 20))
    x = torch.randn(9, 20)
    torch.testing.assert_close(ours(x), module(x))


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "find", lambda: None)
    compiled.load.cache_clear()
    yield
    compiled.load.cache_clear()


def test_without_a_compiler_batch_1_stays_dense_and_says_so(no_compiler):
    with pytest.warns(UserWarning, match="no C compiler found"):
        ours = fast(pruned(), torch.randn(1, 48))
    assert type(ours[0]) is nn.Linear
    assert sparsity_report(ours)["0"].reason.startswith("batch 1: no C compiler found (cc, gcc, clang) -> install one")


def test_without_a_compiler_larger_batches_take_mkl_and_any_batch_is_right(no_compiler):
    module, x = pruned(), torch.randn(8, 48)
    ours = fast(module, x)
    report = sparsity_report(ours)
    assert [row.decision for row in report.rows] == ["csr", "csr"]
    assert "no C compiler found" in report.note
    assert "without compiled kernels" in str(report)
    for batch in (x, x[:1], x[:0]):
        torch.testing.assert_close(ours(batch), module(batch).detach())


def test_a_model_that_moves_to_a_machine_without_compiler_still_computes(monkeypatch):
    module, x = pruned(), torch.randn(1, 48)
    stored = pickle.dumps(fast(module, x))
    monkeypatch.setattr(compiler, "find", lambda: None)
    compiled.load.cache_clear()
    ours = pickle.loads(stored)
    torch.testing.assert_close(ours(x), module(x).detach())
    monkeypatch.undo()
    compiled.load.cache_clear()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 20)
        self.layer = nn.Linear(20, 20)
        self.layer.weight = self.embedding.weight

    def forward(self, x):
        return self.layer(self.embedding(x.abs().long() % 20))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def forward(self, x):
        return self.layer(x) + x @ self.layer.weight


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def forward(self, x):
        return x * 2


def masked():
    layer = nn.Linear(20, 20)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.9)
    return layer


def hooked():
    layer = nn.Linear(20, 20)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def patched():
    layer = nn.Linear(20, 20)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 3
    return layer


def inside_compiled():
    return torch.compile(nn.Linear(20, 20), backend="eager")


class HalfPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 20).bfloat16()

    def forward(self, x):
        return self.layer(x.bfloat16()).float()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Tied, "tied to another layer"),
        (Reads, "read outside its own forward"),
        (lambda: Subclass(20, 20), "class of its own"),
        (Unused, "not called"),
        (masked, "computed from others"),
        (hooked, "has hooks"),
        (patched, "forward was replaced"),
        (inside_compiled, "torch.compile"),
        (HalfPrecision, "bfloat16"),
        (lambda: torch.nn.utils.parametrizations.orthogonal(nn.Linear(20, 20)), "parametrized"),
        (lambda: nn.Conv1d(20, 20, 3, padding=1), "only 1x1"),
        (lambda: nn.Conv1d(20, 20, 1, groups=2), "groups=2"),
        (lambda: nn.Conv1d(20, 20, 1, padding=1), "padding"),
        (lambda: nn.Linear(20, 20), "density above"),
    ],
)
def test_what_something_else_depends_on_stays_dense_and_says_why(make, reason):
    torch.manual_seed(0)
    inner = make()
    if "density" not in reason:
        with torch.no_grad():
            for parameter in inner.parameters():
                if parameter.dim() > 1:
                    parameter[torch.rand_like(parameter.float()) < 0.9] = 0
    module = nn.Sequential(inner, nn.Identity()).eval()
    x = torch.randn(20, 20)
    with torch.no_grad():
        before = module(x)
        with pytest.warns(UserWarning, match="sparsify left Sequential as it is"):
            ours = fast(module, x)
        assert any(reason in row.reason for row in sparsity_report(ours).rows)
        assert not sparsity_report(ours).sparse
        assert torch.equal(ours(x), before)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformers_keep_what_torch_reads_past_the_layers(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    module = nn.Sequential(
        nn.Linear(32, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 8)
    )
    module = prune(module, 0.9).eval()
    x = torch.randn(3, 7, 32)
    ours = fast(module, x)
    assert {row.name for row in sparsity_report(ours).sparse} >= {"0", "2"}
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(ours(x), module(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours(x[:1, :1]), module(x[:1, :1]), rtol=1e-4, atol=1e-5)


def test_reading_the_weight_of_a_sparse_layer_is_right():
    module = pruned()
    ours = fast(module, torch.randn(4, 48))
    assert torch.equal(ours[0].weight, module[0].weight)
    with pytest.raises(KeyError, match="already exists"):
        ours[0].weight = nn.Parameter(torch.zeros(40, 48))


def test_a_layer_held_at_two_places_stays_one_layer():
    layer = prune(nn.Linear(20, 20), 0.9)
    ours = fast(nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(4, 20))
    assert isinstance(ours[0], SparseLinear)
    assert ours[0] is ours[2]


@pytest.mark.parametrize("batch", [1, 8])
def test_state_dicts_go_both_ways(batch):
    one, two, x = pruned(seed=1), pruned(seed=2), torch.randn(batch, 48)
    ours, other = fast(one, x), fast(two, x)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for rows in (batch, 1, 5):
        y = torch.randn(rows, 48)
        assert torch.equal(other(y), ours(y))
    other.load_state_dict(two.state_dict())
    torch.testing.assert_close(other(x), two(x).detach())
    other.load_state_dict(ours.state_dict(), assign=True)
    assert torch.equal(other(x), ours(x))
    assert set(other.state_dict()) == {f"{i}.{k}" for i in (0, 2) for k in ("values", "columns", "row_starts", "bias")}


def test_state_dicts_go_between_compiled_and_mkl(no_compiler):
    module, x = pruned(seed=1), torch.randn(8, 48)
    mkl = fast(pruned(seed=2), x)
    compiled.load.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "find", lambda: ["cc"])
        ours = fast(module, x)
        mkl.load_state_dict(ours.state_dict())
        assert [ours[0].columns.dtype, mkl[0].columns.dtype] == [torch.int16, torch.int32]
        torch.testing.assert_close(mkl(x), module(x).detach())
        ours.load_state_dict(mkl.state_dict())
        torch.testing.assert_close(ours(x), module(x).detach())


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


def test_convolutions_load_dense_state_dicts():
    one, two = (prune(nn.Conv2d(20, 30, 1), 0.9).eval() for _ in range(2))
    x = torch.randn(2, 20, 5, 5)
    ours = fast(one, x)
    ours.load_state_dict(two.state_dict())
    torch.testing.assert_close(ours(x), two(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_denser_weight_loads_with_a_warning():
    ours, dense = fast(pruned(), torch.randn(4, 48)), pruned(sparsity=0.0)
    x = torch.randn(4, 48)
    with pytest.warns(UserWarning, match=r"it may be slower than dense -> sparsify again"):
        ours.load_state_dict(dense.state_dict())
    torch.testing.assert_close(ours(x), dense(x).detach())


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("columns", lambda t: t + 48, r"outside \[0, 48\)"),
        ("columns", lambda t: t.int() - 48, r"outside \[0, 48\)"),
        ("columns", lambda t: t[:-1], "values but"),
        ("columns", lambda t: t.long(), "columns must be int32 or int16"),
        ("row_starts", lambda t: t[:-1], "39 rows where 40 are needed"),
        ("row_starts", lambda t: t.flip(0), "do not rise"),
        ("row_starts", lambda t: t + 1, "do not rise"),
        ("bias", lambda t: t[:-1], "size mismatch"),
    ],
)
def test_a_damaged_state_dict_is_refused_and_the_layer_stays(key, change, message):
    module, x = pruned(), torch.randn(8, 48)
    ours = fast(module, x)[0]
    before, state = ours(x), ours.state_dict()
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict({**state, key: change(state[key])})
    if key != "bias":
        assert torch.equal(ours(x), before)


def test_missing_unexpected_and_misshapen_entries_are_named():
    ours = fast(pruned(), torch.randn(4, 48))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.values"):
        ours.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"0\.weight has shape \(2, 2\), the layer \(40, 48\)"):
        ours.load_state_dict({**ours.state_dict(), "0.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("batch", [1, 8])
def test_copies_pickles_and_shared_memory_compute_the_same(batch):
    x = torch.randn(batch, 48)
    ours = fast(pruned(), x)
    ours(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours).share_memory()):
        assert torch.equal(twin(x), ours(x))
        assert [r.decision for r in sparsity_report(twin).rows] == [r.decision for r in sparsity_report(ours).rows]


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


def test_gradients_and_training_mode_are_refused():
    x = torch.randn(4, 48)
    ours = fast(pruned(), x)
    with pytest.raises(RuntimeError, match=r"has no gradient -> use torch.no_grad\(\), or densify"):
        ours(x.clone().requires_grad_())
    with torch.no_grad():
        ours(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"is for inference -> call .eval\(\)"):
        ours.train()(x)
    assert not list(ours.parameters())


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to("meta")])
def test_moves_to_where_nothing_was_measured_are_refused(change):
    x = torch.randn(4, 48)
    ours = fast(pruned(), x)[0]
    before = ours(x)
    with pytest.raises(RuntimeError, match="SparseLinear cannot become"):
        change(ours)
    assert torch.equal(ours(x), before)


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


def test_densify_gives_back_a_module_to_train():
    module = nn.Sequential(pruned(), nn.Unflatten(1, (48, 1)), prune(nn.Conv1d(48, 20, 1, stride=1), 0.8)).eval()
    x = torch.randn(4, 48)
    ours = fast(module, x)
    back = densify(ours)
    assert isinstance(ours[0][0], SparseLinear)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), module.state_dict().values(), strict=True))
    assert torch.equal(back(x), module(x))
    back.train()(x).sum().backward()
    assert all(p.grad is not None for p in back.parameters())
    assert densify(ours, inplace=True) is ours
    assert type(ours[0][0]) is nn.Linear


def test_sparsify_again_measures_again():
    ours = fast(pruned(), torch.randn(8, 48))
    again = fast(ours, torch.randn(1, 48))
    assert [row.decision for row in sparsity_report(again).rows] == ["gather", "gather"]
    with pytest.warns(UserWarning, match="not faster"):
        assert type(fast(ours, torch.randn(1, 48), never)[0]) is nn.Linear


def test_the_original_and_the_random_state_stay_and_inplace_changes_the_module():
    module, x = pruned(), torch.randn(4, 48)
    state = torch.get_rng_state()
    fast(module, x)
    assert torch.equal(state, torch.get_rng_state())
    assert type(module[0]) is nn.Linear
    assert fast(module, x, inplace=True) is module
    assert isinstance(module[0], SparseLinear)


def test_a_failing_measurement_leaves_the_module_as_it_was():
    module = pruned()

    def fails(dense, sparse):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast(module, torch.randn(4, 48), fails, inplace=True)
    assert type(module[0]) is nn.Linear
    assert "_watched" not in vars(module[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: (3, torch.ones(1)), TypeError, r"module must be a torch\.nn\.Module, got int"),
        (lambda: (pruned(), [torch.ones(1)]), TypeError, r"example_input must be a tensor, a tuple .* got list"),
        (lambda: (pruned(), 3), TypeError, "got int"),
        (lambda: (pruned(), torch.ones(2, 3)), ValueError, "Sequential cannot run on example_input"),
        (lambda: (pruned().train(), torch.ones(2, 48)), ValueError, r"call module.eval\(\) first"),
        (lambda: (torch.compile(pruned(), backend="eager"), torch.ones(2, 48)), ValueError, "sparsify first"),
        (lambda: (torch.jit.trace(pruned(), torch.ones(2, 48)), torch.ones(2, 48)), ValueError, "is compiled"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_bad_modules_and_examples_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        fast(*arguments())


@pytest.mark.parametrize("least", [0.5, 0, float("nan"), float("inf"), "2"])
def test_bad_speedups_are_refused(least):
    with pytest.raises(ValueError, match="min_speedup must be a number of at least 1"):
        fast(pruned(), torch.ones(2, 48), min_speedup=least)


def test_a_layer_itself_cannot_be_replaced_in_place():
    layer = prune(nn.Linear(20, 20), 0.9).eval()
    with pytest.raises(ValueError, match="use what sparsify returns"):
        fast(layer, torch.randn(2, 20), inplace=True)
    assert isinstance(fast(layer, torch.randn(2, 20)), SparseLinear)


def test_a_module_without_pruned_layers_warns_with_what_was_found():
    with pytest.warns(UserWarning, match=r"0: density 1.00, density above 0.7; 2: .* -> prune\(module, 0.9\) first"):
        fast(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.ones(2, 4))
    with pytest.warns(UserWarning, match="ReLU as it is: it has no Linear layer and no convolution"):
        fast(nn.ReLU().eval(), torch.ones(2, 4))


def test_examples_may_be_tuples_or_dicts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = prune(nn.Linear(20, 20), 0.9)

        def forward(self, x, *, scale=1.0, shift=0.0):
            return self.layer(x) * scale + shift

    module, x = Two().eval(), torch.randn(3, 20)
    for example in ((x,), {"x": x, "scale": 2.0}):
        assert isinstance(fast(module, example).layer, SparseLinear)


def test_the_report_tells_layers_sizes_times_and_reasons():
    module, x = pruned(), torch.randn(8, 48)
    before = sparsity_report(module)
    assert [row.reason for row in before.rows] == ["not measured"] * 2
    assert before["0"].density == pytest.approx(float((module[0].weight != 0).float().mean()))
    turn = iter([2.0, 3.0, 1.0, 1.0])
    report = sparsity_report(fast(module, x, lambda dense, sparse: [(next(turn), 1.0)]))
    kept = int((module[0].weight != 0).sum())
    assert (report["0"].dense_bytes, report["0"].sparse_bytes) == (4 * 48 * 40, kept * 8 + 4 * 41)
    assert (report["0"].decision, report["0"].speedup, report["0"].batch) == ("csr", 3.0, 8)
    assert report["2"].decision == "dense"
    text = str(report)
    assert "1 of 2 layers sparse" in text
    assert "measured faster" in text
    with pytest.raises(KeyError, match=r"no layer 'x'; there are \['0', '2'\]"):
        report["x"]


def test_the_clock_is_read_in_turn_and_medians_count():
    calls = []
    rounds = measure(lambda: calls.append("dense"), lambda: calls.append("sparse"))
    assert len(rounds) >= 9
    assert all(seconds > 0 for pair in rounds for seconds in pair)
    assert {"dense", "sparse"} == set(calls)
    assert summary([(2.0, 1.0)] * 3).certain == 2.0
    with pytest.raises(ValueError, match="returned no rounds"):
        summary([])


@pytest.mark.parametrize(
    ("layer", "capability", "reason"),
    [
        (nn.Conv2d(4, 4, 1), (9, 0), "only Linear"),
        (nn.Linear(4, 4), (9, 0), "needs float16 or bfloat16"),
        (nn.Linear(4, 4).half(), (7, 5), "compute capability 8.0"),
        (nn.Linear(4, 4).half(), (8, 0), "only the pattern 2:4"),
        (nn.Linear(6, 4).half(), (8, 0), "only the pattern 2:4"),
    ],
)
def test_on_cuda_only_two_of_four_in_half_precision_is_tried(layer, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in semi_structured.obstacle(layer)


def test_two_of_four_passes_the_checks_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    layer = nn.Linear(8, 8).half()
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    assert semi_structured.obstacle(layer) is None
