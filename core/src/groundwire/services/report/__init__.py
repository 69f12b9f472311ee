"""The findings of a run: collected, written to ``findings.json``, and drawn as ``report.html``."""
