"""Who runs where: the fork server, its jobs and ranks, launchers."""
