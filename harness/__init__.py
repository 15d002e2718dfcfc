"""Cells in, records out: runs sweeps of training steps and turns records into tables and figures."""
