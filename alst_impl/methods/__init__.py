"""Methods to train on long sequences; one file each, selected by its name."""
