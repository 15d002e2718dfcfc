"""Every gradient of a run against the stock model in fp64."""
