"""LIMES keeps the contract of groundwire plugins."""

import pytest

from groundwire.testing import check_plugin
from groundwire_limes import LIMES


@pytest.mark.slow
@pytest.mark.ddp
def test_limes_keeps_the_contract():
    report = check_plugin(
        lambda: LIMES(batches_per_step=2, season=3),
        neutral=lambda: LIMES(batches_per_step=10**6, training_prior="forecast"),
    )
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
