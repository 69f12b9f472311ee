"""State dicts, copies and the way back to a dense module; a damaged state is refused."""

import copy
import io
import pickle

import pytest
import torch
from cram_sparse_layers import fast, pruned
from torch import nn

from groundwire_cram import prune
from groundwire_cram.sparse import (
    SparseLinear,
    densify,
    sparsity_report,
)


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


def test_state_dicts_go_between_compiled_and_mkl(request):
    module, x = pruned(seed=1), torch.randn(8, 48)
    ours = fast(module, x)
    request.getfixturevalue("no_numba")
    mkl = fast(pruned(seed=2), x)
    mkl.load_state_dict(ours.state_dict())
    assert [ours[0].columns.dtype, mkl[0].columns.dtype] == [torch.int16, torch.int32]
    torch.testing.assert_close(mkl(x), module(x).detach())
    ours.load_state_dict(mkl.state_dict())
    torch.testing.assert_close(ours(x), module(x).detach())


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


def test_the_original_and_the_random_state_stay_and_inplace_changes_the_module():
    module, x = pruned(), torch.randn(4, 48)
    state = torch.get_rng_state()
    fast(module, x)
    assert torch.equal(state, torch.get_rng_state())
    assert type(module[0]) is nn.Linear
    assert fast(module, x, inplace=True) is module
    assert isinstance(module[0], SparseLinear)


class Conv1D(nn.Module):
    """As in transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


@pytest.mark.parametrize("batch", [1, 8])
def test_the_conv1d_of_transformers_becomes_sparse_and_comes_back(batch):
    module, x = prune(nn.Sequential(Conv1D(40, 48), nn.ReLU(), Conv1D(48, 40)), 0.9).eval(), torch.randn(batch, 48)
    ours = fast(module, x)
    assert [type(ours[0]), type(ours[2])] == [SparseLinear] * 2
    torch.testing.assert_close(ours(x), module(x).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x[None]), module(x[None]).detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[0].weight, module[0].weight)
    back = densify(ours)
    assert type(back[0]) is Conv1D
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), module.state_dict().values(), strict=True))
    assert torch.equal(back(x), module(x))
    other = prune(nn.Sequential(Conv1D(40, 48), nn.ReLU(), Conv1D(48, 40)), 0.9).eval()
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(x), other(x).detach(), rtol=1e-4, atol=1e-4)
