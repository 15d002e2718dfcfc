"""Verdicts on records: claims, comparisons, probes, planted defects."""
