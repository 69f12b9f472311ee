"""FLEA keeps the contract of groundwire plugins."""

import pytest
from torch import nn
from torch.utils.data import DataLoader

from groundwire.testing import Classifier, Rows, check_plugin
from groundwire_flea import FLEA


class Sourced(Classifier):
    """Trains on five sources of 80 images."""

    def train_dataloader(self):
        return DataLoader(Rows(400), 50, shuffle=True)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")
def test_flea_keeps_the_contract():
    report = check_plugin(
        lambda: FLEA(n_clean=3, embed=nn.AvgPool2d(4), permutations=1),
        neutral=lambda: FLEA(mode="report", permutations=0, embed=nn.AvgPool2d(4)),
        module=Sourced,
    )
    expected = {"late_built_model", "both_lightning_packages"}
    assert {o.name for o in report.outcomes if o.status != "passed"} == expected, str(report)
