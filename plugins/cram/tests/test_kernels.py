"""Every kernel backend equals the reference bit for bit, and the reference equals rules written independently."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings

from groundwire_cram import kernels
from groundwire_cram.kernels import Part
from groundwire_cram.kernels.reference import Reference

BACKENDS = [name for name in ("aten", "numba") if name in kernels.BACKENDS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 8), (5, 12, 2), (2, 3, 4, 2), (1, 4), (7,), (8, 4, 3, 3), (4, 0), (3, 1)]
#: Ties, both zeros, the smallest subnormals and the largest numbers of each dtype.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 6e-8, 1e-40, -3e-39, 65504.0, 3.3e38, -3.3e38]
perhaps = settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])


def same(a, b):
    """Equal bit for bit: +0 is not -0; NaN equals NaN."""
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.nan_to_num(7).contiguous().view(as_int), b.nan_to_num(7).contiguous().view(as_int)
    )


def tensor(rng, shape, dtype, special):
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 2)
    chosen = rng.choice(SPECIAL, shape)
    return torch.tensor(np.where(rng.random(shape) < special, chosen, values)).to(dtype).clamp(-65504, 65504)


@st.composite
def problems(draw, dtypes=DTYPES, shapes=SHAPES):
    """Weights, first and second gradients and a scale; layouts other than contiguous too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    special = draw(st.sampled_from([0.0, 0.3, 1.0]))
    lists = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
        tensors = [tensor(rng, shape, dtype, special) for _ in lists]
        layout = draw(st.sampled_from(["contiguous", "contiguous", "transposed", "mixed", "gaps"]))
        for i, (t, into) in enumerate(zip(tensors, lists, strict=True)):
            if layout == "transposed" or (layout == "mixed" and i):
                t = t.transpose(0, -1).contiguous().transpose(0, -1)
            if layout == "gaps":
                t = torch.stack([t, t], dim=-1)[..., 0]
            into.append(t)
        lists[1][-1] = None if draw(st.integers(0, 5)) == 0 else lists[1][-1]
    scale = draw(st.sampled_from([0.05, 0.1, 1.0, 0.0, 1 / 3, 1e-3]))
    return (*lists, scale)


def clones(tensors):
    return [t if t is None else t.clone() for t in tensors]


def magnitudes(weights, grads, scale):
    """``|w + scale * g|`` entry by entry with NumPy scalars, as the rule is defined; no torch arithmetic."""
    result = []
    for w, g in zip(weights, grads, strict=True):
        for i, x in enumerate(w.reshape(-1).tolist()):
            result.append(abs(x if g is None else moved(x, g.reshape(-1)[i].item(), scale, w.dtype)))
    return sorted(result)


def moved(x, y, scale, dtype):
    product = torch.tensor(np.float32(y) * np.float32(scale)).to(dtype).item()
    return torch.tensor(np.float32(x) + np.float32(product)).to(dtype).item()


def ranks_of(n):
    return sorted({1, n, max(1, n // 2), max(1, int(0.9 * n))}) if n else []


@given(problem=problems())
@perhaps
def test_the_reference_finds_the_mth_smallest_of_rounded_product_then_sum(problem):
    weights, grads, _, scale = problem
    expected = magnitudes(weights, grads, scale)
    ranks = ranks_of(len(expected))
    found = Reference().thresholds(Part(weights, grads, scale), ranks)
    assert found.finite == (not expected or math.isfinite(expected[-1]))
    if found.finite:
        assert found.values == tuple(expected[m - 1] for m in ranks)


@pytest.mark.parametrize("backend_name", BACKENDS)
@given(problem=problems())
@perhaps
def test_thresholds_equal_the_reference(backend_name, problem):
    weights, grads, _, scale = problem
    ranks = ranks_of(sum(w.numel() for w in weights))
    backend = kernels.select(backend_name)[0]
    found = backend.thresholds(Part(weights, grads, scale), ranks)
    assert repr(found) == repr(Reference().thresholds(Part(weights, grads, scale), ranks))
    unmoved = Reference().thresholds(Part(weights, None, 0.0), ranks[::-1])
    assert backend.thresholds(Part(weights, None, scale), ranks[::-1]) == unmoved


@pytest.mark.parametrize("backend_name", BACKENDS)
@given(problem=problems(), where=st.sampled_from([0.0, 0.5, 1.0, None]), plus=st.booleans())
@perhaps
def test_perturb_and_combine_equal_the_reference(backend_name, problem, where, plus):
    weights, grads, second, scale = problem
    n = sum(w.numel() for w in weights)
    threshold = None
    if where is not None and n:
        selection = Reference().thresholds(Part(weights, grads, scale), [max(1, int(where * n))])
        threshold = selection.values[0] if selection.finite else 0.5
    results = []
    for backend in (kernels.select(backend_name)[0], Reference()):
        w, two = clones(weights), clones(second)
        saved = [torch.empty_like(t) for t in w]
        part = Part(w, grads, scale)
        backend.perturb(part, threshold, saved)
        perturbed = clones(w)
        backend.combine(part, threshold, saved, two, plus=plus)
        results.append([*perturbed, *saved, *two])
        assert all(map(same, w, weights))
    assert all(map(same, *results))


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
@given(data=st.data())
@settings(perhaps, max_examples=25)
def test_nm_equals_the_reference(backend_name, n, m, data):
    fitting = [s for s in SHAPES if len(s) > 1 and not math.prod(s) % m]
    weights, grads, second, scale = data.draw(problems(shapes=fitting))
    results = []
    for backend in (kernels.select(backend_name)[0], Reference()):
        w, two = clones(weights), clones(second)
        saved = [torch.empty_like(t) for t in w]
        part = Part(w, grads, scale)
        backend.perturb(part, (n, m), saved)
        perturbed = clones(w)
        backend.combine(part, (n, m), saved, two, plus=True)
        results.append([*perturbed, *saved, *two])
        assert all(map(same, w, weights))
    assert all(map(same, *results))
