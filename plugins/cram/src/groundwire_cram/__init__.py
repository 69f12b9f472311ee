"""CrAM, the compression-aware minimizer (Peste, Vladu, Kurtic, Lampert, Alistarh, 2022), for PyTorch Lightning."""

from groundwire_cram.callback import CrAM
from groundwire_cram.pruning import prune
from groundwire_cram.recalibration import recalibrate_batchnorm

__all__ = ["CrAM", "prune", "recalibrate_batchnorm"]
