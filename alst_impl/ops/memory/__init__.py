"""Memory savings: tiling, the tiled loss, recomputation, and offload to the host."""
