"""Arctic Long Sequence Training (arXiv:2506.13996) for unmodified Hugging Face models."""
