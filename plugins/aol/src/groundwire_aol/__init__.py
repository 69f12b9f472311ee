"""Almost-orthogonal Lipschitz layers (Prach and Lampert, 2022), and certificates, for PyTorch Lightning."""

from groundwire_aol.callback import AOL
from groundwire_aol.certify.attacks import Audit, audit_bound
from groundwire_aol.certify.bound import Bound, lipschitz_bound
from groundwire_aol.certify.certificates import certified_accuracy, certified_radius
from groundwire_aol.certify.metrics import CertifiedAccuracy, CertifiedRadius
from groundwire_aol.certify.propagation import LayerBound
from groundwire_aol.certify.rounding import Rounding
from groundwire_aol.convert.conversion import lipschitz
from groundwire_aol.errors import UnknownLipschitzError, UnsoundError
from groundwire_aol.layers.activations import GroupSort, MaxMin, NActivation
from groundwire_aol.layers.linear import (
    AOLConv1d,
    AOLConv2d,
    AOLConv3d,
    AOLConvTranspose2d,
    AOLLinear,
    NormalizedLinear,
)
from groundwire_aol.layers.normalization import BatchCentering
from groundwire_aol.layers.parametrization import bake, constrain
from groundwire_aol.loss import OffsetCrossEntropy

__all__ = [  # noqa: RUF022 - grouped as people meet them
    "AOL",
    "lipschitz",
    "lipschitz_bound",
    "Bound",
    "LayerBound",
    "Rounding",
    "certified_radius",
    "certified_accuracy",
    "CertifiedAccuracy",
    "CertifiedRadius",
    "OffsetCrossEntropy",
    "audit_bound",
    "Audit",
    "AOLLinear",
    "AOLConv1d",
    "AOLConv2d",
    "AOLConv3d",
    "AOLConvTranspose2d",
    "NormalizedLinear",
    "MaxMin",
    "GroupSort",
    "NActivation",
    "BatchCentering",
    "constrain",
    "bake",
    "UnsoundError",
    "UnknownLipschitzError",
]
