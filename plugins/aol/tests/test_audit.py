"""The audit finds what is unsound and nothing else."""

import pytest
import torch
from torch import nn

from groundwire_aol import AOLLinear, MaxMin, audit_bound


def data(rows=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    return [(part, part[:, :3].argmax(1)) for part in x.split(16)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(AOLLinear(6, 8), MaxMin(), AOLLinear(8, 3))


def test_a_proved_bound_survives():
    audit = audit_bound(network(), data(), directory="/")
    assert audit.sound
    assert audit.attacked > 5
    assert 0.5 < audit.jacobian <= audit.bound


def test_a_bound_that_is_too_small_is_broken_and_the_counterexamples_are_kept(tmp_path):
    net = network()
    audit = audit_bound(net, data(), bound=0.3, directory=tmp_path)
    assert not audit.sound
    assert audit.successes > 0
    found = torch.load(audit.counterexamples)
    assert (found["perturbation"].norm(dim=1) < found["radius"]).all()
    assert (net.eval()(found["input"] + found["perturbation"]).argmax(1) != found["target"]).all()


def test_without_an_attack_only_jacobians_are_compared():
    audit = audit_bound(network(), data(), attack=False, bound=0.3)
    assert (audit.attacked, audit.successes, audit.sound) == (0, 0, False)


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        audit_bound(network(), [])
