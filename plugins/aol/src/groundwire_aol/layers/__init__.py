"""Layers with spectral norm at most 1, their weights, activations, normalization and initial values."""
