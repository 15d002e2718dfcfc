"""Ways to train a long sequence; one file each, selected by its name."""
