"""Figures of an experiment; a YAML selects each by its name."""
