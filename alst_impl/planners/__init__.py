"""Planners: which documents of a global batch go to which devices, by file name. Imports no torch."""
