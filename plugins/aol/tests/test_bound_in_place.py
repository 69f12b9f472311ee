"""What models change in place, and what they keep, is bounded soundly or refused."""

import pytest
import torch
from aol_written import Apply
from torch import nn
from torch.nn import functional as F

from groundwire_aol import UnknownLipschitzError, lipschitz_bound


def test_a_counter_in_forward_is_refused():
    class Counter(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(UnknownLipschitzError, match="every call"):
        lipschitz_bound(Counter(), torch.rand(1, 3))


def sum_under_two_names(m, x):
    y = z = m.layer(x)
    y += x
    return y + z


def factor_in_a_view(m, x):
    y = m.layer(x)
    half = y[:, :4]
    half *= 7
    return y


def quotient_that_is_cut_off_near_zero(m, x):
    y = z = m.layer(x)
    y /= 0.1
    return F.relu(z - 50)


def result_not_used(m, x):
    y = m.layer(x)
    y.tanh_()
    return y


def sum_in_a_constant(m, x):
    y = z = m.layer.weight[:1].repeat(x.shape[0], 1)
    y += x
    return y + z


IN_PLACE = (
    sum_under_two_names,
    factor_in_a_view,
    quotient_that_is_cut_off_near_zero,
    result_not_used,
    sum_in_a_constant,
)


@pytest.mark.parametrize("forward", IN_PLACE)
@pytest.mark.parametrize("example", [torch.zeros(1, 8), torch.ones(1, 8)])
def test_what_is_changed_in_place_must_not_be_read_under_its_old_name(forward, example):
    with pytest.raises(UnknownLipschitzError, match="in place"):
        lipschitz_bound(Apply(forward, layer=nn.Linear(8, 8, bias=False)), example)


def test_a_residual_block_may_add_in_place():
    def forward(m, x):
        y = m.layer(x)
        y += x
        y -= 2 * x
        y *= 3
        y /= 2
        return F.relu(y, inplace=True)

    torch.manual_seed(0)
    block = Apply(forward, layer=nn.Linear(8, 8)).double()
    x = torch.randn(1, 8, dtype=torch.float64)
    bound = lipschitz_bound(block, x)
    layer = float(torch.linalg.matrix_norm(block.layer.weight.detach(), 2))
    assert float(bound) == pytest.approx((layer + 3) * 1.5, rel=1e-5)
    assert not bound.rounding.unknown
    assert torch.linalg.matrix_norm(torch.autograd.functional.jacobian(block, x).squeeze(), 2) <= float(bound)


def test_the_input_itself_may_be_changed_in_place():
    def forward(m, x):
        x *= 3
        return x

    example = torch.ones(1, 4)
    assert float(lipschitz_bound(Apply(forward), example)) == pytest.approx(3, rel=1e-5)
    assert torch.equal(example, torch.ones(1, 4))


def test_a_state_that_takes_in_the_input_is_refused():
    def forward(m, x):
        m.layer.running_mean += x.mean(1)
        return x + m.layer.running_mean

    with pytest.raises(UnknownLipschitzError):
        lipschitz_bound(Apply(forward, layer=nn.BatchNorm1d(1)), torch.zeros(1, 4))


def test_a_constant_that_does_not_fit_any_batch_is_refused():
    with pytest.raises(UnknownLipschitzError, match="add"):
        lipschitz_bound(Apply(lambda m, x: x + m.layer.weight, layer=nn.Linear(8, 5)), torch.zeros(1, 8))


def test_zeros_are_as_good_an_example_as_any():
    class Odd(nn.Module):
        def forward(self, x):
            return x if isinstance(x, torch.fx.Proxy) else 100 * x

    with pytest.raises(UnknownLipschitzError, match="does not compute what was traced"):
        lipschitz_bound(Odd(), torch.zeros(1, 4))
