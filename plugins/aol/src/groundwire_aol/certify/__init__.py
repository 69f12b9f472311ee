"""Certificates: bounds of the Lipschitz constant and of rounding, certified radii, and attempts to break them."""
