"""Backends in the places where they run: threads, forked children, Triton's interpreter; and how one is chosen."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import groundwire_cram
from groundwire_cram import kernels
from groundwire_cram.kernels import Part, threads
from groundwire_cram.kernels.reference import Reference


def problem(*shapes, dtype=torch.float32, seed=0):
    """Weights, gradients and second gradients."""
    generator = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(3))


def step(backend, weights, grads, second, scale=0.05, pattern=None):
    """Everything that a step computes, after checking that the weights are restored."""
    entries = sum(w.numel() for w in weights)
    ranks = [1, entries // 2, math.ceil(0.9 * entries), entries]
    selection = backend.thresholds(Part(weights, grads, scale), ranks)
    w, two = [w.clone() for w in weights], [t.clone() for t in second]
    saved = [torch.empty_like(t) for t in w]
    pattern = pattern or selection.values[2]
    part = Part(w, grads, scale)
    backend.perturb(part, pattern, saved)
    perturbed = [t.clone() for t in w]
    backend.combine(part, pattern, saved, two, plus=True)
    assert all(map(torch.equal, w, weights))
    return selection, [*perturbed, *two]


def assert_same(a, b):
    assert a[0] == b[0]
    assert all(map(torch.equal, a[1], b[1]))


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["aten", "numba"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_any_number_of_threads_computes_the_same(name, pattern, torch_threads, monkeypatch):
    monkeypatch.setattr(threads, "WORTHWHILE", 1000)
    tensors = problem((64, 24, 3, 3), (100,), (300, 40), dtype=torch.float32)
    tensors = tensors if pattern is None else [[t for t in ts if t.dim() > 1] for ts in tensors]
    backend = kernels.select(name)[0]
    expected = step(Reference(), *tensors, pattern=pattern)
    for count in (1, 2, 7):
        torch_threads(count)
        assert_same(step(backend, *tensors, pattern=pattern), expected)


def test_work_is_shared_out_without_gaps_and_small_work_is_not(torch_threads):
    torch_threads(3)
    sizes = [5, threads.WORTHWHILE, 0, 3 * threads.WORTHWHILE]
    parts = threads.cut(sizes)
    assert len(parts) == 3
    assert len({sum(stop - start for _, start, stop in part) for part in parts}) <= 2
    covered = [(i, e) for part in parts for i, start, stop in part for e in (start, stop)]
    assert [i for i, _ in covered] == sorted(i for i, _ in covered)
    assert sum(stop - start for part in parts for _, start, stop in part) == sum(sizes)
    assert len(threads.cut([threads.WORTHWHILE // 2] * 2)) == 1


@pytest.mark.ddp
def test_a_forked_child_runs_the_kernels_that_its_parent_ran(torch_threads, monkeypatch):
    monkeypatch.setattr(threads, "WORTHWHILE", 1000)
    torch_threads(2)
    tensors, backend = problem((200, 100)), kernels.select("numba")[0]
    expected = step(backend, *tensors)
    assert threads._pools
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(2)
            assert not threads._pools
            assert_same(step(backend, *tensors), expected)
            assert threads._pools
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same(step(backend, *tensors), expected)


def test_nm_keeps_the_largest_of_each_group_by_an_argsort_written_here():
    for shape, n, m in [((6, 8), 2, 4), ((5, 3, 2, 2), 2, 4), ((4, 16, 3, 3), 4, 8), ((4, 6, 2), 1, 3)]:
        (w,), (g,), _ = problem(shape, seed=n * m)
        v = (w.numpy() + (g.numpy() * np.float32(0.1)).astype(np.float32)).astype(np.float32)
        last = np.moveaxis(v, 1, -1)
        groups = np.abs(last).reshape(-1, m)
        keep = np.zeros_like(groups, dtype=bool)
        np.put_along_axis(keep, np.argsort(groups, axis=1)[:, m - n :], True, axis=1)
        expected = torch.from_numpy(v * np.moveaxis(keep.reshape(last.shape), -1, 1))
        for name in ("reference", "aten", "numba"):
            moved = w.clone()
            kernels.select(name)[0].perturb(Part([moved], [g], 0.1), (n, m), [torch.empty_like(w)])
            assert torch.equal(moved, expected), (name, shape)


def test_of_equal_magnitudes_the_earlier_is_pruned_first():
    for name in ("reference", "aten", "numba"):
        w = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 2.0, -0.0, 0.0]])
        kernels.select(name)[0].perturb(Part([w], None, 0.0), (2, 4), [torch.empty_like(w)])
        assert w.tolist() == [[0, 0, 1, 1, 0, 2, 0, 0]], name


@pytest.mark.parametrize("name", ["reference", "aten", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_wherever_it_is_and_kept(name, dtype, bad):
    backend = kernels.select(name)[0]
    for place in (0, 17, 99):
        for which in (0, 1):
            tensors = problem((10, 10), (3, 4), dtype=dtype)
            tensors[which][0].view(-1)[place] = bad
            weights, grads, _ = tensors
            selection = backend.thresholds(Part(weights, grads, 0.5), [1, 100])
            assert not selection.finite
            assert all(map(math.isnan, selection.values))
            assert not backend.thresholds(Part(weights, grads, 0.5), []).finite
            backend.perturb(Part(weights, grads, 0.5), 1.0, [torch.empty_like(w) for w in weights])
            assert not weights[0].view(-1)[place].isfinite()
    assert backend.thresholds(Part(*problem((10, 10))[:2], 0.5), []).finite


def test_an_overflow_of_the_sum_is_not_finite():
    for name in ("reference", "aten", "numba"):
        huge = [torch.full((2, 2), 3e38)]
        assert not kernels.select(name)[0].thresholds(Part(huge, huge, 1.0), [1]).finite


def test_kept_entries_that_are_zero_keep_their_second_gradient():
    for name in ("reference", "aten", "numba"):
        w, two = [torch.tensor([[0.0, 0.0, 0.0, 0.0]])], [torch.tensor([[1.0, 2.0, 3.0, 4.0]])]
        kernels.select(name)[0].combine(Part(w, None, 0.1), (2, 4), [w[0].clone()], two, plus=True)
        assert two[0].tolist() == [[0, 0, 3, 4]]


def test_weights_that_the_second_pass_did_not_reach_are_restored():
    for name in ("reference", "aten", "numba"):
        weights, grads, second = problem((4, 4), (5, 8))
        w, saved = [t.clone() for t in weights], [torch.empty_like(t) for t in weights]
        backend = kernels.select(name)[0]
        part = Part(w, grads, 0.1)
        backend.perturb(part, 0.5, saved)
        backend.combine(part, 0.5, saved, [None, second[1]], plus=False)
        assert all(map(torch.equal, w, weights))


def test_parameters_that_require_a_gradient_are_written_and_autograd_is_told():
    for name in ("reference", "aten", "numba"):
        backend = kernels.select(name)[0]
        p = torch.nn.Parameter(torch.ones(2, 2))
        loss = (p * p).sum()
        backend.perturb(Part([p], [torch.ones(2, 2)], 1.0), None, [torch.empty(2, 2)])
        assert p.tolist() == [[2, 2], [2, 2]]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_bad_arguments_are_refused_before_anything_is_written():
    for name in ("reference", "aten", "numba"):
        backend = kernels.select(name)[0]
        for rank in (0, 5):
            with pytest.raises(ValueError, match=rf"rank must be in 1\.\.4.*got {rank}"):
                backend.thresholds(Part([torch.ones(2, 2)], None, 0.0), [rank])
        for shape, n, m in [((2, 3), 2, 4), ((8,), 2, 4), ((2, 4), 4, 4), ((2, 4), 0, 4)]:
            good, bad = torch.ones(2, 4), torch.ones(shape)
            with pytest.raises(ValueError, match=f"{n}:{m}"):
                backend.perturb(Part([good, bad], None, 0.0), (n, m), [torch.empty_like(good), torch.empty_like(bad)])
            assert good.all()
    with pytest.raises(ValueError, match="3 entries goes with a weight of 4"):
        kernels.select("numba")[0].perturb(Part([torch.ones(4)], [torch.ones(4)], 1.0), None, [torch.empty(3)])


def test_the_fastest_backend_is_chosen_and_the_reason_given():
    backend, reason = kernels.select("auto", [torch.ones(2)])
    assert (backend.name, reason) == ("numba", "the fastest on cpu")
    backend, reason = kernels.select("auto", [torch.ones(2), torch.ones(3).double()])
    assert (backend.name, reason) == ("aten", "numba does not have the dtype torch.float64")
    backend, reason = kernels.select("auto", [torch.ones(2, device="meta")])
    assert (backend.name, reason) == ("aten", "there are no compiled kernels for meta")


def test_unknown_and_unusable_backends_are_refused():
    with pytest.raises(ValueError, match="must be one of auto, reference, aten, numba, triton, got 'cuda'"):
        kernels.select("cuda")
    with pytest.raises(ValueError, match="numba cannot reach tensors on meta"):
        kernels.select("numba", [torch.ones(1, device="meta")])


def test_without_numba_stock_aten_takes_over_and_says_so():
    code = (
        "sys.modules['numba'] = None\n"
        "from groundwire_cram import kernels\n"
        "backend, reason = kernels.select()\n"
        "assert backend.name == 'aten' and 'numba' in reason and 'pip install numba' in reason, reason\n"
    )
    run(code)


def test_triton_programs_equal_the_reference_in_the_interpreter():
    run(Path(__file__).with_name("triton_in_interpreter.py").read_text(), TRITON_INTERPRET="1")


def test_triton_programs_compile_for_a_gpu_without_fusing_product_and_sum():
    run(Path(__file__).with_name("triton_for_cuda.py").read_text(), TRITON_INTERPRET="0")


def test_triton_is_refused_on_a_cpu_without_the_interpreter():
    run(
        "import torch\n"
        "from groundwire_cram import kernels\n"
        "try:\n"
        "    kernels.select('triton', [torch.ones(1)])\n"
        "except ValueError as error:\n"
        "    assert 'triton cannot reach tensors on cpu' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('not refused')\n",
        TRITON_INTERPRET="0",
    )


def run(code, **environment):
    """Run ``code`` in a process of its own, which imports the kernels alone: they need nothing else of the package."""
    alone = (
        "import sys, types\n"
        "package = sys.modules['groundwire_cram'] = types.ModuleType('groundwire_cram')\n"
        f"package.__path__ = {list(groundwire_cram.__path__)!r}\n"
    )
    without = "assert not {'lightning', 'groundwire'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", alone + code + without],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
