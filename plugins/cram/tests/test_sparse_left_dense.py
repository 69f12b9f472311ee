"""Layers that something else depends on, or that no kernel serves, stay dense and say why."""

import pickle

import pytest
import torch
from cram_sparse_layers import fast
from torch import nn

from groundwire_cram import prune
from groundwire_cram.sparse import SparseLinear, densify, semi_structured, sparsity_report


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


def encoder(nested=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return prune(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested), 0.9).eval()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_the_layers_inside_torchs_encoder_become_sparse_and_fuse_again(nested):
    module, x = encoder(nested), torch.randn(3, 7, 32)
    padding = torch.arange(7)[None] >= torch.tensor([7, 5, 2])[:, None]
    ours = fast(module, {"src": x, "src_key_padding_mask": padding})
    names = {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert {row.name for row in sparsity_report(ours).sparse} == names
    assert module.layers[0].activation_relu_or_gelu == 1
    valid = ~padding
    with torch.no_grad():
        wanted = module(x, src_key_padding_mask=padding)
        for twin in (ours, densify(ours), pickle.loads(pickle.dumps(ours))):
            found = twin(x, src_key_padding_mask=padding)
            torch.testing.assert_close(found[valid], wanted[valid], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-4)
    back = densify(ours)
    assert [layer.activation_relu_or_gelu for layer in back.layers] == [1, 1]
    assert back.use_nested_tensor == nested


def test_an_encoder_layer_that_is_faster_fused_stays_as_it_is():
    module, x = encoder(), torch.randn(3, 7, 32)
    measured = []

    def whole_is_slower(dense, sparse):
        measured.append(tuple(sparse().shape) == tuple(dense().shape))
        return [(2.0, 1.0)] if len(measured) <= 8 else [(1.0, 2.0)]  # two ways for each of four layers come first

    with pytest.warns(UserWarning, match="faster as torch fuses it"):
        ours = fast(module, x, whole_is_slower)
    assert measured == [True] * 10
    assert not sparsity_report(ours).sparse
    assert [layer.activation_relu_or_gelu for layer in ours.layers] == [1, 1]
    with torch.no_grad():
        assert torch.equal(ours(x), module(x))


def test_a_layer_held_at_two_places_stays_one_layer():
    layer = prune(nn.Linear(20, 20), 0.9)
    ours = fast(nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(4, 20))
    assert isinstance(ours[0], SparseLinear)
    assert ours[0] is ours[2]


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
