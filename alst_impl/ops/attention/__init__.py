"""Attention cores: kernels and their backward by hand, rings, the all-to-all of Ulysses."""
