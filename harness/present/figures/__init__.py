"""Drawings of a table; one file each, selected by its name in an experiment."""
