"""CUDA devices whose memory is real and whose arithmetic is not: unmodified programs run on PyTorch's CUDA build."""
