"""Forecasts of what fits: trial steps on phantom devices, searches, plans."""
