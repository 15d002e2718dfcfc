"""Phantom devices: CUDA devices with real memory and no arithmetic, for unmodified programs on
PyTorch's CUDA build.
"""
