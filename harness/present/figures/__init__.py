"""Drawings of a table; experiments name them."""
