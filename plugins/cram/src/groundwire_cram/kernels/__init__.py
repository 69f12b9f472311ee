"""The memory-bound part of a CrAM step: thresholds, perturbation and combination, by several backends."""

from groundwire_cram.kernels.backends import BACKENDS, forced, select
from groundwire_cram.kernels.base import Kernels, Part, Pattern

__all__ = ["BACKENDS", "Kernels", "Part", "Pattern", "forced", "select"]
