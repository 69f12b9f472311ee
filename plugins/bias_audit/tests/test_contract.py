"""BiasAudit keeps the contract of groundwire plugins."""

import pytest

from groundwire.testing import check_plugin
from groundwire_bias_audit import BiasAudit, Gate


@pytest.mark.slow
@pytest.mark.ddp
def test_bias_audit_keeps_the_contract():
    report = check_plugin(
        lambda: BiasAudit(variants=[0.5, 0.9], every_n_epochs=1, gate=Gate()),
        neutral=BiasAudit,
    )
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
