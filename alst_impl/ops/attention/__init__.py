"""Core attention: kernels with explicit backward, ring attention, and the all-to-alls of Ulysses."""
