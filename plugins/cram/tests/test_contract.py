"""CrAM keeps the contract of groundwire plugins."""

import pytest

from groundwire.testing import check_plugin
from groundwire_cram import CrAM


@pytest.mark.slow
@pytest.mark.ddp
def test_cram_keeps_the_contract():
    report = check_plugin(
        lambda: CrAM(sparsities=(0.5, 0.9), rho=0.1, evaluate_every=1),
        neutral=lambda: CrAM(plus=False, rho=0, sparsities=(0,)),
    )
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
