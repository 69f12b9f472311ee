"""Arithmetic of an audit: groups, counts, rates, intervals, tests, gate. No Lightning here."""
