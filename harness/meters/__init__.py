"""Counters for a running step: live bytes, work, a timeline."""
