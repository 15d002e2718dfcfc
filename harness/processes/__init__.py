"""Processes: the fork server, its jobs and ranks, and launchers."""
