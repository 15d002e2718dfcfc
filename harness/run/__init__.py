"""A cell becomes a record, however its run ends."""
