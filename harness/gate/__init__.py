"""Comparison of every gradient of a run with the stock model in fp64."""
