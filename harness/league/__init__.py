"""Runs other people's stacks, as they are, on phantom devices and under the gradient gate."""
