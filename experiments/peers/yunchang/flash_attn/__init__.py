"""Stands in for the package flash-attn, which is published as source alone and needs a CUDA compiler.

Its functions are PyTorch's own build of the same kernels.
"""

from flash_attn.flash_attn_interface import flash_attn_func

__all__ = ["flash_attn_func"]
__version__ = "2.7.4"
