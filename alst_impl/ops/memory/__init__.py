"""What holds less memory: tiles, the tiled loss, recomputation, and tensors that wait on the host."""
