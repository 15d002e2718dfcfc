"""Sources: how the sequences of a run are cut from its text. A source is a file here, and `base` is their interface."""
