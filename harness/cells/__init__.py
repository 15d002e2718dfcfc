"""Data: points of a sweep, hardware rows, predictions, file paths. Imports no torch."""
