"""Worlds execute cells. Only these files know how a run is executed."""
