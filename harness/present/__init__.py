"""Records to tables, figures, the report, the README and its pages. Imports no torch."""
