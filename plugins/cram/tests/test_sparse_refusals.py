"""What sparsify and a sparse layer refuse, and that the module then stays as it was."""

import copy
import pickle

import pytest
import torch
from cram_sparse_layers import fast, pruned
from torch import nn
from torch.autograd import forward_ad

from groundwire_cram import prune
from groundwire_cram.sparse import SparseLinear, densify


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


def test_a_failing_measurement_leaves_the_module_as_it_was():
    module = pruned()

    def fails(dense, sparse):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast(module, torch.randn(4, 48), fails, inplace=True)
    assert type(module[0]) is nn.Linear
    assert "_observed" not in vars(module[0])


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


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to("meta")])
def test_a_refused_move_leaves_the_whole_module_as_it_was(change):
    module = nn.Sequential(nn.Linear(48, 48), pruned(), nn.Linear(48, 3)).eval()
    x = torch.randn(4, 48)
    ours = pickle.loads(pickle.dumps(copy.deepcopy(fast(module, x))))
    assert isinstance(ours[1][0], SparseLinear)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(RuntimeError, match="SparseLinear cannot become"):
        change(ours)
    for name, value in ours.state_dict().items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name
    assert change(densify(ours))[0].weight.dtype != torch.float32 or change(densify(ours))[0].weight.is_meta
    with torch.no_grad():
        ours.double()(x.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_tangents_and_functional_transforms_are_refused():
    x = torch.randn(4, 48)
    for batch in (x, x[:1]):
        ours = fast(pruned(), batch)
        with forward_ad.dual_level(), torch.no_grad():
            ours(batch)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no tangent in forward-mode AD -> densify"):
            ours(forward_ad.make_dual(batch, torch.ones_like(batch)))
        with pytest.raises(RuntimeError, match=r"no rules for torch\.func"):
            torch.func.jvp(ours, (batch,), (torch.ones_like(batch),))
        with pytest.raises(RuntimeError, match=r"no rules for torch\.func"):
            torch.func.vmap(ours)(batch[None])
