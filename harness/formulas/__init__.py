"""Closed formulas: FLOPs, modelled time, simulated pipeline schedules. Imports no torch."""
