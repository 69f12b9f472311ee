"""Bias audits of compressed models: what did compression do to whom."""

from groundwire_bias_audit.api import audit
from groundwire_bias_audit.attribution.shift import AttributionShift, attribution_shift
from groundwire_bias_audit.audit.association import bias_amplification, interdependence, rare_value_ratio
from groundwire_bias_audit.audit.countermeasures import GroupThresholds, compare_override, recalibrate_thresholds
from groundwire_bias_audit.audit.exemplars import cie, flip_rate
from groundwire_bias_audit.audit.gate import Gate, Verdict
from groundwire_bias_audit.audit.susceptibility import bias_risk, evaluate_susceptibility, rank_susceptible
from groundwire_bias_audit.callback import BiasAudit
from groundwire_bias_audit.result import AuditResult

__all__ = [
    "AttributionShift",
    "AuditResult",
    "BiasAudit",
    "Gate",
    "GroupThresholds",
    "Verdict",
    "attribution_shift",
    "audit",
    "bias_amplification",
    "bias_risk",
    "cie",
    "compare_override",
    "evaluate_susceptibility",
    "flip_rate",
    "interdependence",
    "rank_susceptible",
    "rare_value_ratio",
    "recalibrate_thresholds",
]
