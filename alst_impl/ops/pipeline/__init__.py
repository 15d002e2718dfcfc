"""Schedules of pipelines, and what runs them."""
