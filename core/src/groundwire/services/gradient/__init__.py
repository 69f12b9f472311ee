"""The gradient of a step: recording batches, replaying them, and letting plugins replace or edit the gradient."""
