"""A cell becomes a record, whatever happens."""
