"""CrAM offers pruned versions, BiasAudit asks for versions; neither knows the other."""

import numpy as np
from torch.utils.data import DataLoader

from groundwire_bias_audit import BiasAudit
from groundwire_cram import CrAM, prune


def test_the_versions_that_cram_offers_are_audited(kit):
    class WithoutBatchNorm(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = self.net[:1].append(self.net[2]).append(self.net[3])

    audit = BiasAudit(dict(enumerate(np.arange(40) % 2)))
    module = WithoutBatchNorm()
    kit.fit(module, CrAM(sparsities=(0.5, 0.9)), audit, val=DataLoader(kit.data(), 8))
    results = audit.results["validate"]
    assert list(results) == ["dense", "0.5", "0.9"]
    data = kit.data()
    predicted = prune(module, 0.9).eval()(data.tensors[0]).argmax(1)
    right = (predicted == data.tensors[1]).numpy()
    found = results["0.9"].to_frame()["accuracy"].tolist()
    assert found == [right[::2].mean(), right[1::2].mean()]
    assert results["0.9"].comparison is not None
