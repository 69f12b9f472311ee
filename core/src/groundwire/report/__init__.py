"""The findings of a run on disk: ``findings.json`` for machines and ``report.html`` for people."""

from groundwire.report.report import SCHEMA_VERSION, Report

__all__ = ["SCHEMA_VERSION", "Report"]
