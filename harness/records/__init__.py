"""What runs leave behind: records, published numbers, and tables of both. Imports no torch."""
