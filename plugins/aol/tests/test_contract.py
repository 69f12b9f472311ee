"""AOL keeps the contract of groundwire plugins."""

import pytest

from groundwire.testing import check_plugin
from groundwire_aol import AOL


# The kit's inputs are standard normal.
@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:inputs range from")
def test_aol_keeps_the_contract():
    report = check_plugin(lambda: AOL(eps=(0.1, 0.5)), neutral=lambda: AOL(exclude=("",)))
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
