"""Which layers become sparse, on which measurement, with and without a compiler, and what the report says."""

import pickle
from contextlib import nullcontext

import pytest
import torch
from cram_sparse_layers import fast, never, pruned
from torch import nn

from groundwire_cram import prune
from groundwire_cram.sparse import SparseLinear, sparsity_report
from groundwire_cram.sparse.autotune import measure, summary


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


def test_without_numba_batch_1_stays_dense_and_says_so(no_numba):
    with pytest.warns(UserWarning, match="numba cannot be imported"):
        ours = fast(pruned(), torch.randn(1, 48))
    assert type(ours[0]) is nn.Linear
    assert sparsity_report(ours)["0"].reason.startswith("batch 1: numba cannot be imported here")


def test_without_numba_larger_batches_take_mkl_and_any_batch_is_right(no_numba):
    module, x = pruned(), torch.randn(8, 48)
    ours = fast(module, x)
    report = sparsity_report(ours)
    assert [row.decision for row in report.rows] == ["csr", "csr"]
    assert "pip install numba" in report.note
    assert "without compiled kernels" in str(report)
    for batch in (x, x[:1], x[:0]):
        torch.testing.assert_close(ours(batch), module(batch).detach())


def test_a_model_that_moves_to_a_machine_without_numba_still_computes(request):
    module, x = pruned(), torch.randn(1, 48)
    stored = pickle.dumps(fast(module, x))
    request.getfixturevalue("no_numba")
    ours = pickle.loads(stored)
    torch.testing.assert_close(ours(x), module(x).detach())


def test_sparsify_again_measures_again():
    ours = fast(pruned(), torch.randn(8, 48))
    again = fast(ours, torch.randn(1, 48))
    assert [row.decision for row in sparsity_report(again).rows] == ["gather", "gather"]
    with pytest.warns(UserWarning, match="not faster"):
        assert type(fast(ours, torch.randn(1, 48), never)[0]) is nn.Linear


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
