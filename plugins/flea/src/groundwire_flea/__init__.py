"""FLEA, fair learning against adversaries (Iofinova, Konstantinov, Lampert, 2022), for PyTorch Lightning."""

from groundwire_flea.filtering import filter_sources
from groundwire_flea.result import Caution, FLEAResult, FLEAWarning
from groundwire_flea.selector import FLEASelector

__all__ = ["Caution", "FLEAResult", "FLEASelector", "FLEAWarning", "filter_sources"]
