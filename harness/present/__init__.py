"""Tables to figures, report and README. Imports no torch."""
