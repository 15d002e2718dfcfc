"""What fits: steps tried on phantom devices, searches, plans."""
