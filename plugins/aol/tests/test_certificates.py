"""Radii, accuracies, metrics and the loss, against formulas written out."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from groundwire_aol import (
    CertifiedAccuracy,
    CertifiedRadius,
    OffsetCrossEntropy,
    UnsoundError,
    certified_accuracy,
    certified_radius,
)


def example(rows=40, classes=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, classes, generator=generator), torch.randint(classes, (rows,), generator=generator)


def by_hand(logits, target, lipschitz):
    radii = []
    for scores, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        margin = scores[y] - max(s for j, s in enumerate(scores) if j != y)
        radii.append(max(0.0, margin / (math.sqrt(2) * lipschitz)))
    return torch.tensor(radii, dtype=torch.float64)


@pytest.mark.parametrize("lipschitz", [1.0, 0.5, 7.0])
def test_the_radius_is_the_margin_over_root_two_times_the_constant(lipschitz):
    logits, target = example()
    assert torch.allclose(certified_radius(logits, target, lipschitz), by_hand(logits, target, lipschitz), rtol=1e-9)


def test_a_tie_is_not_certified_and_the_radius_itself_is_not_either():
    assert certified_radius(torch.tensor([[1.0, 1.0]]), torch.tensor([0]), 1.0).item() == 0
    assert certified_accuracy(torch.tensor([[1.0, 1.0]]), torch.tensor([0]), eps=(0.0,), lipschitz=1.0).item() == 0
    margin = math.sqrt(2) * 0.5
    logits = torch.tensor([[margin, 0.0]], dtype=torch.float64)
    assert certified_accuracy(logits, torch.tensor([0]), eps=(0.5, 0.499), lipschitz=1.0).tolist() == [0, 1]


def test_data_divided_by_a_deviation_shrinks_the_radius():
    logits, target = example()
    divided = certified_radius(logits, target, 1.0, input_std=(0.2, 0.5))
    assert torch.allclose(divided, 0.2 * certified_radius(logits, target, 1.0), rtol=1e-9)


def test_the_last_layer_option_uses_the_distance_of_each_pair():
    torch.manual_seed(0)
    weight, features = torch.randn(4, 6), torch.randn(9, 6)
    logits = features @ weight.T
    target = logits.argmax(1)
    found = certified_radius(logits, target, 1.0, last_layer=weight)
    for i in range(9):
        y = int(target[i])
        pairs = [(logits[i, y] - logits[i, j]) / (weight[y] - weight[j]).norm() for j in range(4) if j != y]
        assert float(found[i]) == pytest.approx(float(min(pairs)), rel=1e-5)


def test_scores_that_are_not_finite_have_radius_zero():
    logits = torch.tensor([[math.inf, 0.0], [math.nan, 0.0], [0.0, -math.inf]])
    assert certified_radius(logits, torch.zeros(3, dtype=torch.long), 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan, None, torch.nn.Linear(1, 1)])
def test_without_a_positive_finite_constant_there_is_no_certificate(wrong):
    with pytest.raises(UnsoundError):
        certified_radius(*example(), wrong)
    with pytest.raises(UnsoundError):
        CertifiedAccuracy(lipschitz=wrong)


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([0, -1])),
        (torch.zeros(2, 1), torch.tensor([0, 0])),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3, dtype=torch.int), torch.tensor([0, 0])),
        (torch.zeros(2, 3), torch.tensor([0])),
    ],
)
def test_wrong_classes_shapes_and_dtypes_are_refused(logits, target):
    with pytest.raises(ValueError, match=r"class|logits|target"):
        certified_radius(logits, target, 1.0)


def test_the_metrics_add_up_over_batches_in_any_precision():
    logits, target = example()
    eps = (0.0, 0.1, 0.5)
    accuracy, radius = CertifiedAccuracy(eps, 1.0), CertifiedRadius(1.0)
    for part in range(0, 40, 8):
        accuracy.update(logits[part : part + 8], target[part : part + 8])
        radius.update(logits[part : part + 8], target[part : part + 8])
    assert torch.allclose(accuracy.compute().double(), certified_accuracy(logits, target, eps, 1.0))
    assert radius.compute().item() == pytest.approx(by_hand(logits, target, 1.0).mean().item(), rel=1e-6)
    half = CertifiedAccuracy(eps, 1.0)
    half.update(logits.half(), target)
    assert torch.allclose(half.compute().double(), certified_accuracy(logits.half(), target, eps, 1.0))


def _rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    logits, target = example()
    accuracy, radius = CertifiedAccuracy((0.0, 0.2), 1.0), CertifiedRadius(1.0)
    for metric in (accuracy, radius):
        metric.update(logits[rank::2], target[rank::2])
    torch.save([accuracy.compute(), radius.compute()], os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.ddp
def test_the_metrics_add_up_over_processes(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    logits, target = example()
    for rank in (0, 1):
        accuracy, radius = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(accuracy.double(), certified_accuracy(logits, target, (0.0, 0.2), 1.0))
        assert radius.item() == pytest.approx(by_hand(logits, target, 1.0).mean().item(), rel=1e-6)


def test_the_loss_is_cross_entropy_of_scores_with_an_offset():
    logits, target = example()
    loss = OffsetCrossEntropy(offset=0.7, temperature=0.3)
    total = 0.0
    for scores, y in zip(logits.double(), target.tolist(), strict=True):
        shifted = [(float(s) - 0.7 * (j == y)) / 0.3 for j, s in enumerate(scores)]
        total += 0.3 * (math.log(sum(map(math.exp, shifted))) - shifted[y])
    assert loss(logits, target).item() == pytest.approx(total / len(target), rel=1e-5)
    hard = torch.nn.functional.one_hot(target, 5).float()
    assert loss(logits, hard).item() == pytest.approx(loss(logits, target).item(), rel=1e-6)


def test_the_loss_takes_soft_labels_and_refuses_wrong_ones():
    logits, _ = example()
    shares = torch.softmax(torch.randn(40, 5), 1)
    shifted = (logits - 0.7 * shares) / 0.3
    expected = -0.3 * (shares * shifted.log_softmax(1)).sum(1).mean()
    assert OffsetCrossEntropy(0.7, 0.3)(logits, shares).item() == pytest.approx(expected.item(), rel=1e-5)
    for target in (torch.full((40,), 5), torch.zeros(40, 4), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"target|classes"):
            OffsetCrossEntropy()(logits, target)
