"""Rows and counts of the passes of a Lightning run, and of the variants of its model."""
