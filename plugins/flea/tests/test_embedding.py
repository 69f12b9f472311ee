"""Inputs that are no table, and data sets of which not every row is read."""

import pytest
import torch
from flea_clinics_of_tests import GOOD, Net, Rows, fit
from torch import nn
from torch.utils.data import Dataset

from groundwire_flea import FLEA

pytestmark = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


class Images(Dataset):
    """Rows of a table hidden in images, so that only a projection of the pixels matters."""

    def __init__(self, data):
        torch.manual_seed(0)
        x = torch.tensor((data.X - data.X.mean(0)) / data.X.std(0)).float()
        self.pixels = (x[:, :4] @ torch.randn(4, 64)).view(-1, 1, 8, 8) + 0.1 * torch.randn(len(x), 1, 8, 8)
        self.rows = Rows(data)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return (self.pixels[i], *self.rows[i][1:])


@pytest.mark.parametrize(
    "embed", [None, "encoder", nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), lambda x: x.flatten(1)[:, :20]],
    ids=["pixels", "name", "module", "function"],
)  # fmt: skip
def test_images_are_embedded_and_reduced(kit, bad, embed):
    module = Net(64)
    module.encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))
    flea = FLEA(embed=embed, permutations=0)
    _, module = fit(kit, Images(bad), flea, module)
    assert flea.decision.named(False) == ["clinic 1", "clinic 3"]
    assert all(m.training for m in module.encoder)


def test_only_some_rows_of_large_sources_are_read_where_sources_are_known(kit, bad):
    read = []

    class Watched(Rows):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    flea = FLEA(source="clinics", max_rows_per_source=60, permutations=0)
    fit(kit, Watched(bad), flea, max_steps=0)
    assert len(set(read)) <= 5 * 60 + 1
    assert set(flea.decision.named(True)) == GOOD
