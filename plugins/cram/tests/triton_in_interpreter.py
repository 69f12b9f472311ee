"""Run by a test in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import itertools

import torch

from groundwire_cram import kernels
from groundwire_cram.kernels import Part
from groundwire_cram.kernels.reference import Reference


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def outcome(backend, weights, grads, second, pattern, plus):
    w, two, saved = [[t.clone() for t in ts] for ts in (weights, second, weights)]
    part = Part(w, grads, 0.05)
    backend.perturb(part, pattern, saved)
    perturbed = [t.clone() for t in w]
    backend.combine(part, pattern, saved, two, plus=plus)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(w, weights, strict=True))
    return [bits(t) for t in [*perturbed, *saved, *two]]


def main():
    triton = kernels.select("triton", [torch.ones(1)])[0]
    reference = Reference()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(3)
        shapes = (33, 40), (8, 4, 3, 3), (5, 8), (7,), (4, 3, 2, 2), (0, 4)
        weights, grads, second = ([torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(3))
        weights[0][0, :9] = torch.tensor([0.0, -0.0, 1, -1, 1, 1, 6e-8, -6e-8, 2.0])  # Zeros, ties, subnormals.
        grads[0][0, :9] = 0
        weights[1], grads[1] = (t.to(memory_format=torch.channels_last) for t in (weights[1], grads[1]))
        grads[2] = torch.stack([grads[2], grads[2]], dim=-1)[..., 0]
        grads[4] = None
        entries = sum(w.numel() for w in weights)
        ranks = [1, entries // 2, int(0.9 * entries), entries]
        selection = triton.thresholds(Part(weights, grads, 0.05), ranks)
        assert selection == reference.thresholds(Part(weights, grads, 0.05), ranks), dtype
        for pattern, plus in itertools.product((selection.values[2], None, (2, 4), (4, 8), (1, 3)), (True, False)):
            chosen = [
                i for i, w in enumerate(weights)
                if not isinstance(pattern, tuple) or (w.dim() > 1 and not w.numel() % pattern[1])
            ]  # fmt: skip
            tensors = [[ts[i] for i in chosen] for ts in (weights, grads, second)]
            a, b = (outcome(backend, *tensors, pattern, plus) for backend in (triton, reference))
            assert all(map(torch.equal, a, b)), (dtype, pattern, plus)
        grads[0][5, 5] = float("nan")
        assert not triton.thresholds(Part(weights, grads, 0.05), ranks).finite


if __name__ == "__main__":
    main()
