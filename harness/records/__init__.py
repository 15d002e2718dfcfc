"""Records, published numbers, and tables of both. Imports no torch."""
