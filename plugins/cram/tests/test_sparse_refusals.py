"""What sparsify and a sparse layer refuse, and that the module then stays as it was."""

import pytest
import torch
from cram_sparse_layers import fast, pruned
from torch import nn

from groundwire_cram import prune
from groundwire_cram.sparse import SparseLinear


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
