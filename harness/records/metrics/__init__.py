"""What a record says; one file per metric, applied to every record."""
