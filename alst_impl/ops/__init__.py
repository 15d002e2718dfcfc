"""Functions and autograd Functions on tensors and process groups, usable alone."""
