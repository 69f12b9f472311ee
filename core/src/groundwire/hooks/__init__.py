"""Hooks: how implementations are marked, put in order, found and called."""
