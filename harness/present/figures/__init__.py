"""Figures of an experiment, which a YAML selects by name."""
