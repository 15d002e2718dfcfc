"""Data: points of a sweep, hardware rows, predictions, where files lie. Imports no torch."""
