"""Commands of the command line. Slow packages are imported where they are used."""
