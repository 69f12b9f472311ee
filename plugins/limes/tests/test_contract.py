"""LIMES keeps the contract of groundwire plugins."""

from groundwire.testing import check_plugin
from groundwire_limes import LIMES


def test_limes_keeps_the_contract():
    report = check_plugin(
        lambda: LIMES(batches_per_step=2, season=3),
        neutral=lambda: LIMES(batches_per_step=10**6, training_prior="forecast"),
    )
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
