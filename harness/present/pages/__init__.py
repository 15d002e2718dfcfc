"""Pages of `results/reference/`, generated from the committed records; one file each, found by its name."""
