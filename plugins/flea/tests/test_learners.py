"""Fair learners behind the filter: the loss term, the weights, and fairlearn."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundwire_flea import (
    DemographicParityLoss,
    Reweighing,
    demographic_parity_penalty,
    filter_sources,
    reweighing,
)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.floats(0.1, 5)), min_size=2, max_size=40))
def test_after_reweighing_labels_do_not_depend_on_groups(rows):
    groups, y, weight = (np.array(column) for column in zip(*rows, strict=True))
    new = reweighing(y, sensitive_features=groups, sample_weight=weight)
    assert (new > 0).all()
    present = {(g, label) for g, label, _ in rows}
    if len(present) == len(set(groups)) * len(set(y)):
        assert new.sum() == pytest.approx(weight.sum())
        for g in set(groups):
            assert new[groups == g].sum() == pytest.approx(weight[groups == g].sum())
            rate = new[(groups == g) & (y == 1)].sum() / new[groups == g].sum()
            assert rate == pytest.approx(weight[y == 1].sum() / weight.sum())


def test_reweighing_refuses_what_it_cannot_weigh():
    for weight in ([1.0, -1.0], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="sample_weight"):
            reweighing([0, 1], sensitive_features=[0, 1], sample_weight=weight)
    with pytest.raises(ValueError, match="different numbers of rows"):
        reweighing([0, 1, 1], sensitive_features=[0, 1])


def test_labels_and_groups_of_a_batch_may_have_any_values_that_the_training_rows_have():
    y, groups = torch.tensor([1, 1, -1, 1, -1, -1]), torch.tensor([-1, 7, 7, -1, -1, 7])
    weights = Reweighing(y, groups)
    expected = reweighing(y, sensitive_features=groups)
    torch.testing.assert_close(weights(y, groups).double(), torch.tensor(expected), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"groups has a value that no training row has; known are \[-1, 7\]"):
        weights(torch.tensor([1]), torch.tensor([0]))


def test_weights_for_batches_are_the_weights_of_the_rows():
    generator = torch.Generator().manual_seed(0)
    y, groups = torch.randint(2, (50,), generator=generator), torch.randint(3, (50,), generator=generator)
    weight = torch.rand(50, generator=generator).double()
    expected = reweighing(y, sensitive_features=groups)
    torch.testing.assert_close(Reweighing(y, groups)(y, groups).double(), torch.tensor(expected), atol=1e-6, rtol=0)
    expected = reweighing(y, sensitive_features=groups, sample_weight=weight)
    weighted = Reweighing(y, groups, weight)(y, groups) * weight
    torch.testing.assert_close(weighted.double(), torch.tensor(expected), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(st.integers(2, 4), st.integers(0, 10_000))
def test_the_penalty_is_the_largest_gap_of_mean_probabilities(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    p, g = torch.rand(60, generator=generator).double(), torch.randint(groups, (60,), generator=generator)
    weight = torch.rand(60, generator=generator).double()
    means = [float((p * weight)[g == k].sum() / weight[g == k].sum()) for k in g.unique()]
    penalty = demographic_parity_penalty(p, g, weight)
    assert float(penalty) == pytest.approx(max(means) - min(means), abs=1e-3)


def test_the_penalty_has_a_finite_gradient_where_the_gap_is_zero_and_none_with_one_group():
    p = torch.full((6,), 0.5, requires_grad=True)
    demographic_parity_penalty(p, torch.tensor([0, 1] * 3)).backward()
    assert torch.isfinite(p.grad).all()
    assert demographic_parity_penalty(p, torch.zeros(6)).item() == 0
    weights = torch.tensor([1.0, 0.0] * 3)
    assert demographic_parity_penalty(p, torch.tensor([0, 1] * 3), weights).item() == 0


def test_gradients_of_the_loss_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    y, g = torch.randint(3, (12,), generator=generator), torch.tensor([0, 1, 2] * 4)
    weight = torch.rand(12, generator=generator).double()
    for shape, targets in (((12,), y.clamp(max=1)), ((12, 3), y)):
        logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for balanced in (False, True):
            loss = DemographicParityLoss(0.5, class_balanced=balanced)
            assert torch.autograd.gradcheck(
                lambda z, loss=loss, targets=targets: loss(z, targets, groups=g, sample_weight=weight), (logits,)
            )


def test_a_strength_of_zero_is_weighted_cross_entropy():
    logits, y, w = torch.randn(10, 3), torch.randint(3, (10,)), torch.rand(10)
    expected = (nn.functional.cross_entropy(logits, y, reduction="none") * w).sum() / w.sum()
    torch.testing.assert_close(
        DemographicParityLoss(0)(logits, y, groups=torch.arange(10) % 2, sample_weight=w), expected
    )
    with pytest.raises(ValueError, match="strength"):
        DemographicParityLoss(-1)
    with pytest.raises(ValueError, match="do not fit"):
        demographic_parity_penalty(torch.rand(3), torch.zeros(2))


@pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")
def test_the_loss_makes_a_linear_model_fairer(table):
    data = table(5)
    x = torch.tensor((data.X - data.X.mean(0)) / data.X.std(0)).float()
    y, g = torch.tensor(data.y), torch.tensor(data.a)
    gaps = []
    for strength in (0.0, 3.0):
        torch.manual_seed(0)
        model, loss = nn.Linear(5, 1), DemographicParityLoss(strength)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(150):
            optimizer.zero_grad()
            loss(model(x), y, groups=g).backward()
            optimizer.step()
        gaps.append(demographic_parity_penalty(model(x).sigmoid().squeeze(-1), g).item())
    assert gaps[1] < 0.3 * gaps[0]


@pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")
def test_fairlearn_works_behind_the_filter_and_the_attack_is_undone(table):
    from fairlearn.metrics import demographic_parity_difference
    from fairlearn.reductions import DemographicParity, ExponentiatedGradient
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    clean, attacked = table(5), table(5, (1, 3))
    result = filter_sources(attacked.X, attacked.y, sensitive_features=attacked.a, sources=attacked.source)
    gaps = {}
    for name, rows in {"all": np.ones(len(attacked.y), dtype=bool), "kept": result.mask}.items():
        estimator = make_pipeline(StandardScaler(), LogisticRegression())
        learner = ExponentiatedGradient(
            estimator, DemographicParity(difference_bound=0.02), sample_weight_name="logisticregression__sample_weight"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.fit(attacked.X[rows], attacked.y[rows], sensitive_features=attacked.a[rows])
        predicted = learner.predict(clean.X, random_state=0)
        gaps[name] = demographic_parity_difference(clean.y, predicted, sensitive_features=clean.a)
    assert gaps["kept"] < gaps["all"]
