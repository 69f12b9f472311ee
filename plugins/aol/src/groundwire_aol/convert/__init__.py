"""Conversion of a stock network into a 1-Lipschitz one."""
