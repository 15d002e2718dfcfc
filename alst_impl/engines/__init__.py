"""Engines, which own parameters, gradients and the optimizer; one file each, selected by its name."""
