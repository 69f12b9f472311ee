"""CrAM, the compression-aware minimizer (Peste, Vladu, Kurtic, Lampert, Alistarh, 2022), for PyTorch Lightning."""

from groundwire_cram.acdc import ACDC
from groundwire_cram.callback import CrAM
from groundwire_cram.masks import freeze_masks
from groundwire_cram.operators import NM, Chain, Magnitude, Operator, Quantize
from groundwire_cram.optimizer import CrAMOptimizer
from groundwire_cram.pruning import compress, prune, quantize
from groundwire_cram.recalibration import recalibrate_batchnorm
from groundwire_cram.sparse.report import SparsityReport
from groundwire_cram.sparse.sparsify import densify, sparsify, sparsity_report

__all__ = [
    "ACDC",
    "NM",
    "Chain",
    "CrAM",
    "CrAMOptimizer",
    "Magnitude",
    "Operator",
    "Quantize",
    "SparsityReport",
    "compress",
    "densify",
    "freeze_masks",
    "prune",
    "quantize",
    "recalibrate_batchnorm",
    "sparsify",
    "sparsity_report",
]
