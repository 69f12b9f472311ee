"""Attributions by captum, and how they shift from the model to a variant."""
