"""Figures of an experiment; one file each, which a YAML selects by its name."""
