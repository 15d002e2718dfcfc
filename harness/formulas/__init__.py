"""Closed formulas: FLOPs, modelled time, pipelines played without executing them. Imports no torch."""
