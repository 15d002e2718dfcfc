"""Stands in for the package flash-attn, which is published as source alone and needs a CUDA compiler.

Its functions are PyTorch's own build of the same kernels. On the CPU, where there are none, they are SDPA by document.
"""
