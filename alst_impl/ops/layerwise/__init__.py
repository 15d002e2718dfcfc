"""Whole decoder layers in tiles, with attention in head groups."""
