"""Pipeline schedules and their executor."""
