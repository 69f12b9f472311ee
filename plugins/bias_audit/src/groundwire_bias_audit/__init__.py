"""Bias audits of compressed models: what did compression do to whom."""

from groundwire_bias_audit.api import audit
from groundwire_bias_audit.gate import Gate, Verdict
from groundwire_bias_audit.result import AuditResult

__all__ = ["AuditResult", "Gate", "Verdict", "audit"]
