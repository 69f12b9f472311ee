"""FLEA, fair learning against adversaries (Iofinova, Konstantinov, Lampert, 2022), for PyTorch Lightning."""

from groundwire_flea.callback import FLEA
from groundwire_flea.datamodule import FLEADataModule
from groundwire_flea.fair_loss import DemographicParityLoss, demographic_parity_penalty
from groundwire_flea.inputs.dataset import SourceDatasets
from groundwire_flea.result import Caution, FLEAResult, FLEAWarning
from groundwire_flea.reweighing import Reweighing, reweighing
from groundwire_flea.selector import FLEASelector, filter_sources

__all__ = [
    "FLEA",
    "Caution",
    "DemographicParityLoss",
    "FLEADataModule",
    "FLEAResult",
    "FLEASelector",
    "FLEAWarning",
    "Reweighing",
    "SourceDatasets",
    "demographic_parity_penalty",
    "filter_sources",
    "reweighing",
]
